"""Without annotations a labeler judges answers by their claims: rates, what counts as nothing said, and who judged."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlaifv import ROOT
from rlaifv.evaluation.bootstrap import intervals
from rlaifv.evaluation.claim_rates import score_claims
from rlaifv.evaluation.claims import claim_judge, judge_answers, judged_claims
from rlaifv.evaluation.claims_truth import compare_choices, compare_rates, true_rates
from rlaifv.evaluation.hallucination import Split, hallucination, load_split, paired_test, score
from rlaifv.params import _problems, load_params
from rlaifv.records import Instruction, ModelRecord, columns_of, rates_of, write_jsonl
from rlaifv.steps.models import describe, write_models
from rlaifv.steps.select import choose, keeps_recall
from rlaifv.store import Store
from rlaifv.tinyworld.coco import write_world

YES, NO = {"p_yes": 0.9, "p_no": 0.1}, {"p_yes": 0.1, "p_no": 0.9}
JUDGE = {"labeler": "judge", "same_labeler": False}


def row(name: str, *verdicts: dict, image: str = "", problem: str = "", answer: str = "one two three") -> dict:
    claims = [{"claim": "c", "question": "q?", **verdict} for verdict in verdicts]
    return {"id": name, "image": image or name, "question": "What?", "answer": answer, "problem": problem,
            "claims": claims, **JUDGE}  # fmt: skip


def split_of(answers: list[dict]) -> Split:
    asked = [Instruction(a["id"], a["image"], a["question"]) for a in answers]
    return Split("test", asked, {}, {}, [], Path(), annotated=False)


def test_the_rates_are_those_of_rejected_and_accepted_claims():
    tie = {"p_yes": 0.5, "p_no": 0.5}
    answers = [row("a", YES, NO), row("b", YES, YES, YES), row("c", tie), row("d"), row("e", problem="not divided")]
    found = hallucination(answers, split_of(answers))
    assert found["response_rejection"] == 2 / 3, "a and c, of a, b and c: a tie is rejected, d and e claim nothing"
    assert found["claim_rejection"] == 2 / 6 and found["accepted_claims"] == 4 / 5
    assert (found["mean_words"], found["n"], found["not_judged"]) == (3, 5, 1)
    assert (found["labeler"], found["same_labeler"]) == ("judge", False)
    assert columns_of(found) == [*rates_of(found), "mean_words", "n", "labeler", "same_labeler"]
    for rate in (*rates_of(found), "mean_words"):
        low, high = found[f"{rate}_interval"]
        assert low <= found[rate] <= high
    assert not [key for key in found if "hallucination" in key or "chair" in key or "recall" in key]


def test_a_model_that_says_nothing_or_cannot_be_divided_keeps_no_accepted_claims():
    for silent in ([row("a"), row("b")], [row("a", problem="cut"), row("b", problem="cut")]):
        found = hallucination(silent, split_of(silent))
        assert (found["response_rejection"], found["accepted_claims"]) == (0, 0)


def test_answers_to_one_image_are_drawn_together():
    alone = [row(str(n), YES if n % 2 else NO) for n in range(40)]
    same = [{**a, "image": str(n // 4 * 4 + n % 2)} for n, a in enumerate(alone)]  # 20 images, two alike answers each
    wide, narrow = (intervals(score_claims(rows))["response_rejection"] for rows in (same, alone))
    assert wide[1] - wide[0] > 1.2 * (narrow[1] - narrow[0])


def test_two_models_are_compared_on_the_same_answers_and_by_one_labeler_only():
    base, aligned = [row(str(n), YES, NO) for n in range(30)], [row(str(n), YES, YES) for n in range(30)]
    tests = paired_test(base, aligned, split_of(base))
    assert tests["response_rejection"]["difference"] == -1 and tests["response_rejection"]["p_value"] < 0.01
    assert tests["accepted_claims"]["difference"] == 1 and tests["mean_words"]["p_value"] == 1
    with pytest.raises(ValueError, match="judged by different labelers do not compare"):
        score_claims([*base, {**row("x", YES), "labeler": "another"}])
    with pytest.raises(ValueError, match="1 answers without annotations were not judged by claims, first 0"):
        score([{"id": "0", "image": "0", "question": "What?", "answer": "a"}], [], split_of(base[:1]))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, train=1, dev=1, test=3)
    return folder


def tiny(role: str) -> ModelRecord:
    params = load_params(ROOT / "params" / "default.yaml")
    return describe(getattr(params, role), params.server)


def test_answers_go_through_the_methods_own_steps_and_come_back_in_order(world, tmp_path):
    params = load_params(ROOT / "params" / "default.yaml")
    instructions = [json.loads(line) for line in (world / "instructions_test.jsonl").read_text().splitlines()]
    true = [{"id": i["id"], "image": i["image_path"], "question": i["question"], "answer": i["reference"]}
            for i in instructions]  # fmt: skip
    false = {**true[0], "id": "false", "answer": true[1]["answer"]}
    answers = [*true, {"id": "unfit", "image": "x", "question": "x", "reason": "too long"},
               {**true[0], "id": "empty", "answer": " "}, false]  # fmt: skip
    judged = judge_answers(
        answers,
        tiny("divider"),
        tiny("labeler"),
        True,
        (params.divide, params.feedback, params.server),
        params.seed,
        world / "images",
        lambda part: Store(f"test-{part}", {}, tmp_path / "scratch"),
        tmp_path / "out",
    )
    assert [r["id"] for r in judged] == [r["id"] for r in answers] and "claims" not in judged[3]
    assert judged[4]["claims"] == [] and judged[4]["problem"] == "" and judged[0]["same_labeler"]
    settings = (params.divide, params.seed, world / "images", params.feedback.suffix, params.server)
    alone = judged_claims(tiny("divider"), tiny("labeler"), true, *settings)
    for one, other in zip(judged, alone, strict=False):
        assert [c["claim"] for c in one["claims"]] == [c["claim"] for c in other["claims"]] and one["claims"]
        assert [c["p_yes"] for c in one["claims"]] == pytest.approx([c["p_yes"] for c in other["claims"]], abs=1e-4)
    assert any(c["p_yes"] <= c["p_no"] for c in judged[5]["claims"]), "what another picture shows is rejected"
    assert (tmp_path / "out" / "judgements" / "labeler.json").is_file()


def test_a_second_labeler_judges_where_one_is_named_and_is_known_for_the_first_where_it_is_the_same(tmp_path):
    params = load_params(ROOT / "params" / "default.yaml")

    def judge_of(second, source=None):
        changed = dataclasses.replace(
            params,
            evaluate=dataclasses.replace(params.evaluate, labeler=second),
            pairs=dataclasses.replace(params.pairs, source=source),
        )
        records = write_models(changed, changed.server, tmp_path / "models")
        assert (tmp_path / "models" / "second_labeler.json").is_file() == (second is not None)
        return claim_judge(
            SimpleNamespace(params=changed, server=changed.server, model=records.get, store=None), tmp_path, tmp_path
        ).keywords

    assert judge_of(None)["labeler"].path == params.labeler.path and judge_of(None)["same_labeler"]
    assert not judge_of(None, "pairs.parquet")["same_labeler"], "somebody else's feedback"
    second = judge_of(params.policy)
    assert second["labeler"].path == params.policy.path and not second["same_labeler"]
    assert judge_of(params.labeler)["same_labeler"], "the same checkpoint under another key"


def test_claim_judged_and_true_rates_are_compared_answer_by_answer():
    judged = [row(str(n), NO if n < 6 else YES, image=f"{n}.png") for n in range(10)]
    found = compare_rates(judged, lambda image, answer: int(int(Path(image).stem) < 5))
    assert (found["by_claims"], found["true"], found["n"]) == (0.6, 0.5, 10)
    assert found["difference"] == pytest.approx(0.1) and found["difference_interval"][0] == 0
    rates = true_rates([{"checkpoint": "c", "answers": judged}], lambda image, answer: 0)
    assert compare_choices("c", "c", rates) == {
        "by_claims": "c", "by_annotations": "c", "true_by_claims": 0.0, "true_by_annotations": 0.0}  # fmt: skip


def test_a_prepared_split_without_instances_is_judged_by_claims(tmp_path):
    write_jsonl(tmp_path / "dev.jsonl", [Instruction("a", "a.png", "What?")])
    split = load_split("dev", tmp_path, tmp_path)
    assert not split.annotated and split.instructions and split.objects == {}
    found = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}
    (tmp_path / "dev_instances.json").write_text(json.dumps(found))
    assert load_split("dev", tmp_path, tmp_path).annotated


def test_the_selection_guards_accepted_claims_as_it_guards_recall():
    base = {"response_rejection": 0.5, "accepted_claims": 8.0}
    rows = [
        {"checkpoint": name, "response_rejection": wrong, "accepted_claims": said}
        for name, wrong, said in (("a", 0.3, 8.1), ("b", 0.2, 7.93), ("c", 0.0, 7.9))
    ]
    assert choose(rows, base, 0.01)["checkpoint"] == "b", "1 % of 8 claims may be lost"
    assert keeps_recall(rows[1], base, 0.01) and not keeps_recall(rows[2], base, 0.01)
    assert choose(rows[2:], base, 0.01)["checkpoint"] == "c"


def test_parameters_that_do_not_fit_how_answers_are_judged_are_refused():
    params = load_params(ROOT / "params" / "default.yaml")
    none = {"instances": None, "captions": None}
    dev, test = (dataclasses.replace(split, **none) for split in (params.prepare.dev, params.prepare.test))
    half = dataclasses.replace(params, prepare=dataclasses.replace(params.prepare, dev=dev))
    whole = dataclasses.replace(params, prepare=dataclasses.replace(params.prepare, dev=dev, test=test))
    assert not list(_problems(whole)) and "give both, or null in both" in next(_problems(half))
    judge = dataclasses.replace(params.evaluate, labeler=params.labeler)
    assert "evaluate.labeler judges claims" in next(_problems(dataclasses.replace(params, evaluate=judge)))
    assert not list(_problems(dataclasses.replace(whole, evaluate=judge)))
    keep = dataclasses.replace(whole, train=dataclasses.replace(params.train, keep_checkpoints=2))
    assert "train.keep_checkpoints scores on dev" in next(_problems(keep))
