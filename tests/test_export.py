"""An exported folder loads with the libraries' own loaders, and its cards say what the run measured."""

import dataclasses
import functools
import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from tiny_llava import picture, save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

import rlaifv.stage
from rlaifv import ROOT
from rlaifv.export import dataset_card, main, model_card
from rlaifv.params import load_params
from rlaifv.records import Candidate, Instruction, to_json, write_atomic
from rlaifv.results import Result, write_result
from rlaifv.stage import Paths
from rlaifv.steps.pairs import Pair, write_pairs

EXAM = {"accuracy": 0.97, "per_type": {"existence": 0.99, "color": 0.95}, "n": 10}


def rates(response: float, recall: float) -> dict:
    values = {"response_hallucination": response, "mention_hallucination": response / 3, "recall": recall}
    intervals = {f"{name}_interval": [value - 0.02, value + 0.02] for name, value in values.items()}
    return {**values, **intervals, "mean_words": 21.5, "n": 300, "yes_no": {"accuracy": 0.93, "n": 90}}


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """The files that two finished iterations leave behind."""
    monkeypatch.setattr(rlaifv.stage, "DATA", tmp_path / "data")
    monkeypatch.setattr(rlaifv.stage, "EXAM", tmp_path / "data" / "results" / "exam" / "labeler.json")
    (tmp_path / "0.png").write_bytes(picture(0))
    for name, test in (("0", rates(0.4, 0.93)), ("1", rates(0.2, 0.92)), ("2", rates(0.1, 0.91))):
        write_result(Paths(name).results, test=test)
        if name == "0":
            write_atomic(rlaifv.stage.EXAM, to_json(EXAM))
            continue
        save_tiny_llava(Paths(name).policy, seed=int(name))
        answers = [Candidate(f"i#{s}", "i", s, text, 3, "stop", 0, "x") for s, text in enumerate(("a dog", "a cat"))]
        pair = Pair(Instruction("i", "0.png", "what is in the image ?", source="test"), *answers, 0, -1)
        write_pairs(Paths(name).pairs, [pair] * int(name), tmp_path, f"iteration-{name}")
        numbers = {"pairs": int(name), "pairs_before_balance": 7, "instructions_with_pairs": 1}
        numbers |= {"mean_words_chosen": 2.0, "mean_words_rejected": 2.0}
        write_result(Paths(name).results, pairs=numbers)
    return tmp_path


def test_model_and_dataset_load_from_the_exported_folder(finished_run):
    out = finished_run / "release"
    main(["--iteration", "2", "--out", str(out)])
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    trained = AutoModelForImageTextToText.from_pretrained(Paths("2").policy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    AutoProcessor.from_pretrained(out / "model")
    load = functools.partial(datasets.load_dataset, str(out / "dataset"), cache_dir=str(finished_run / "cache"))
    assert {name: len(load(name, split="train")) for name in ("iteration_1", "iteration_2")} == {
        "iteration_1": 1,
        "iteration_2": 2,
    }
    row, *others = load(split="train")
    assert len(others) == 2, "and all of them by default"
    assert (row["chosen"], row["rejected"], row["chosen_score"]) == ("a dog", "a cat", 0)
    assert row["image"].size == (24, 24)


def test_the_cards_hold_the_numbers_and_the_limits_of_the_run(finished_run):
    out = finished_run / "release"
    main(["--iteration", "2", "--out", str(out), "--license", "apache-2.0"])
    card = ModelCard.load(out / "model" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-text-to-text"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["response_hallucination"] == 10.0
    for text in ("| base | 40.0 (38.0–42.0) |", "| iteration 2 | 10.0 (8.0–12.0) |", "2.0 points below",
                 "color: 95.0 %", "| 2 | 2 | 7 | 1 | 2.0 | 2.0 |", "| labeler | `models/tiny/labeler` |"):  # fmt: skip
        assert text in card.text, text
    assert json.loads((out / "model" / "metrics.json").read_text())["1"]["recall"] == 0.92
    assert (out / "model" / "training_params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert "import rlaifv" not in card.text
    assert "3 pairs" in DatasetCard.load(out / "dataset" / "README.md").text


def test_an_earlier_iteration_is_exported_with_its_own_data_only(finished_run):
    out = finished_run / "release"
    main(["--iteration", "1", "--out", str(out)])
    assert [f.name for f in (out / "dataset" / "data").iterdir()] == ["iteration_1.parquet"]
    assert "iteration 2" not in (out / "model" / "README.md").read_text()


def test_without_an_exam_of_the_labeler_the_card_says_so(finished_run):
    for exam in (to_json({"n": 0}), None):
        rlaifv.stage.EXAM.unlink()
        if exam:
            write_atomic(rlaifv.stage.EXAM, exam)
        out = finished_run / f"release{exam is None}"
        main(["--iteration", "1", "--out", str(out)])
        assert "How often the labeler is right was not measured" in (out / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("org/model_v1.5 *new*", "`org/model_v1.5 *new*`"),
        ("a`b", "<code>a&#96;b</code>"),
        ("a|b", "<code>a&#124;b</code>"),
        ("a\n\n# b", "`a # b`"),
        ("<script>alert(1)</script>", "<code>&lt;script&gt;alert(1)&lt;/script&gt;</code>"),
    ],
)
def test_a_models_name_is_a_name_in_a_card_and_nothing_else(name, shown):
    params = load_params()
    params = dataclasses.replace(params, labeler=dataclasses.replace(params.labeler, path=name))
    numbers = {"pairs": 1, "pairs_before_balance": 1, "instructions_with_pairs": 1}
    numbers |= {"mean_words_chosen": 2.0, "mean_words_rejected": 2.0}
    results = {"0": Result(test=rates(0.4, 0.9)), "1": Result(test=rates(0.2, 0.9), pairs=numbers)}
    exam = {**EXAM, "per_type": {"[a](b) *c*\nd": 0.5}}
    card = model_card(params, results, exam, None)
    assert f"| labeler | {shown} |\n" in card and "<script" not in card
    assert "(&#91;a&#93;(b) &#42;c&#42; d: 50.0 %)" in card
    loads = "AutoProcessor\n\nimport rlaifv.vlm.omnilmm"
    assert loads not in card and loads in model_card(params, results, exam, None, "rlaifv_omnilmm")
    assert f"the labeler {shown} rejects" in dataset_card(params, results, None)


def test_what_cannot_be_exported_is_one_clear_line_and_leaves_nothing(finished_run):
    (Paths("1").policy / "config.json").unlink()
    for iteration, out, message in (
        ("7", "new", "no iteration '7'"),
        ("1", "new", "iteration 1 has not run"),
        ("2", "new", "iteration 1 has not run"),
    ):
        with pytest.raises(SystemExit, match=message) as end:
            main(["--iteration", iteration, "--out", str(finished_run / out)])
        assert len(end.value.code.splitlines()) == 1
        assert not (finished_run / out).exists()


def test_a_result_that_is_not_there_is_one_clear_line_too(finished_run):
    (Paths("1").results / "test" / "metrics.json").unlink()
    with pytest.raises(SystemExit, match="the stage that writes test has not run") as end:
        main(["--iteration", "2", "--out", str(finished_run / "new")])
    assert len(end.value.code.splitlines()) == 1


def spoil_weights(policy: Path, pairs: Path) -> None:
    (policy / "model.safetensors").write_bytes((policy / "model.safetensors").read_bytes()[:-100])


def lose_weights(policy: Path, pairs: Path) -> None:
    (policy / "model.safetensors").unlink()


def cut_pairs(policy: Path, pairs: Path) -> None:
    pairs.write_bytes(pairs.read_bytes()[:100])


def lose_pairs(policy: Path, pairs: Path) -> None:
    table = pq.read_table(pairs)
    pq.write_table(table.slice(1), pairs)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_weights, "model.safetensors cannot be exported"),
        (lose_weights, "model.safetensors cannot be exported"),
        (cut_pairs, "pairs.parquet cannot be exported"),
        (lose_pairs, "but the run counted"),
    ],
)
def test_a_part_is_not_exported_as_the_whole(finished_run, spoil, said):
    spoil(Paths("2").policy, Paths("2").pairs)
    with pytest.raises(SystemExit, match=said) as end:
        main(["--iteration", "2", "--out", str(finished_run / "broken")])
    assert len(end.value.code.splitlines()) == 1
    assert not list(finished_run.glob("broken*"))


def test_a_folder_of_the_users_beside_it_stays(finished_run):
    beside = finished_run / "mine.partial"
    beside.mkdir()
    (beside / "thesis.txt").write_text("years of work")
    main(["--iteration", "2", "--out", str(finished_run / "mine")])
    assert (beside / "thesis.txt").read_text() == "years of work"


def test_everybody_may_read_what_was_exported(finished_run):
    out = finished_run / "release"
    main(["--iteration", "1", "--out", str(out)])
    for place in (out, *out.rglob("*")):
        assert place.stat().st_mode & 0o777 == (0o755 if place.is_dir() else 0o644)


def test_nothing_is_overwritten(finished_run):
    out = finished_run / "release"
    main(["--iteration", "1", "--out", str(out)])
    before = (out / "model" / "README.md").read_bytes()
    with pytest.raises(SystemExit, match="give another --out"):
        main(["--iteration", "2", "--out", str(out)])
    assert (out / "model" / "README.md").read_bytes() == before


def test_the_card_of_a_run_judged_by_claims_names_the_labeler_and_no_rate_of_annotations():
    values = {"response_rejection": 0.4, "claim_rejection": 0.1, "accepted_claims": 8.0}
    test = values | {f"{name}_interval": [value, value] for name, value in values.items()}
    test |= {"mean_words": 21.5, "n": 300, "yes_no": {"n": 0}, "labeler": "org/labeler", "same_labeler": True}
    pairs = {"pairs": 2, "pairs_before_balance": 7, "instructions_with_pairs": 1}
    pairs |= {"mean_words_chosen": 2.0, "mean_words_rejected": 2.0}
    final = test | {"accepted_claims": 7.5}
    card = model_card(load_params(), {"0": Result(test=test), "1": Result(test=final, pairs=pairs)}, {}, None)
    assert "| base | 40.0 (40.0–40.0) | 10.0 (10.0–10.0) | 8.0 (8.0–8.0) | 21.5 | not measured |" in card
    assert "`org/labeler` judged each, **the labeler that also made the feedback**" in " ".join(card.split())
    assert "Says less: 0.50 accepted claims" in card and "type: accepted_claims" in card
    assert "COCO" not in card and "response hallucination" not in card and "recall" not in card
