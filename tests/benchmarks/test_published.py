"""A score stands beside a paper's only with the paper's judge and protocol, and the table says what differs."""

from dataclasses import replace
from itertools import chain

from rlaifv.benchmarks import published
from rlaifv.benchmarks.spec import V2
from rlaifv.evaluation.scores import Scores

SPEC = published.SPECS["object_halbench"]
OURS = Scores(
    "object_halbench",
    [],
    {"chair_s_refine": ([2], [10]), "chair_i": ([1], [20])},
    {"n": 300},
    {
        "judge": "gpt-3.5-turbo-0613",
        "prompt": "published 0123456789ab",
        "nouns": "en_core_web_trf",
        "vocabulary": "synonyms_refine.txt",
    },
)


def test_the_same_judge_and_protocol_are_comparable():
    assert SPEC.differences(OURS) == []
    first, *others = SPEC.table(OURS, "mine")
    assert first["comparable"] and first["chair_s_refine"] == 0.2
    assert {"model": "RLAIF-V 7B", "source": V2, "chair_s_refine": 0.105, "chair_i": 0.052} in others


def test_another_judge_another_prompt_and_missing_rows_are_not_and_the_table_says_so():
    settings = {**OURS.settings, "judge": "some-open-model", "prompt": "ours 0123456789ab"}
    other = replace(OURS, settings=settings, missing=[{"id": "1", "reason": "no reply"}])
    first = SPEC.table(other, "mine")[0]
    assert not first["comparable"]
    for part in ("judge: some-open-model, published: gpt-3.5-turbo-0613", "prompt: ours", "1 rows are not scored"):
        assert part in first["because"]


def test_the_released_split_of_refomb_is_never_comparable():
    scores = Scores("refomb", [], {}, {"n": 99}, {"judge": "gpt-4-1106-preview", "prompt": "published 01"})
    assert [reason.split(":")[0] for reason in published.SPECS["refomb"].differences(scores)] == ["split"]


def test_a_benchmark_without_published_rows_is_not_comparable():
    assert published.SPECS["chair"].differences(Scores("chair", [], {}, {})) != []


def test_published_rates_are_fractions():
    for row in chain.from_iterable(spec.rows for spec in published.SPECS.values()):
        assert all(0 < value < 1 for name, value in row.metrics.items() if name != "score")
