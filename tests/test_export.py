"""A published folder loads with the libraries' own loaders, and its cards say what the run measured."""

import json

import datasets
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from tiny_llava import picture, save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

import rlaifv.stage
from rlaifv import ROOT
from rlaifv.export import main
from rlaifv.records import Candidate, Instruction, to_json, write_atomic
from rlaifv.stage import Paths
from rlaifv.steps.pairs import Pair, write_pairs


def rates(response: float, recall: float) -> dict:
    values = {"response_hallucination": response, "mention_hallucination": response / 3, "recall": recall}
    intervals = {f"{name}_interval": [value - 0.02, value + 0.02] for name, value in values.items()}
    return {**values, **intervals, "mean_words": 21.5, "n": 300, "yes_no": {"accuracy": 0.93, "n": 90}}


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """The files that two finished rounds leave behind."""
    monkeypatch.setattr(rlaifv.stage, "DATA", tmp_path / "data")
    (tmp_path / "0.png").write_bytes(picture(0))
    for name, test in (("0", rates(0.4, 0.93)), ("1", rates(0.2, 0.92)), ("2", rates(0.1, 0.91))):
        write_atomic(Paths(name).results / "test.json", to_json(test))
        if name == "0":
            labeler = {"accuracy": 0.97, "per_type": {"existence": 0.99, "color": 0.95}, "n": 10}
            write_atomic(Paths(name).results / "labeler.json", to_json(labeler))
            continue
        save_tiny_llava(Paths(name).policy, seed=int(name))
        answers = [Candidate(f"i#{s}", "i", s, text, 3, "stop", 0, "x") for s, text in enumerate(("a dog", "a cat"))]
        pair = Pair(Instruction("i", "0.png", "what is in the image ?", source="test"), *answers, 0, -1)
        write_pairs(Paths(name).pairs, [pair] * int(name), tmp_path, f"round-{name}")
        numbers = {"pairs": int(name), "pairs_before_balance": 7, "instructions_with_pairs": 1}
        numbers |= {"mean_words_chosen": 2.0, "mean_words_rejected": 2.0}
        write_atomic(Paths(name).results / "pairs.json", to_json(numbers))
    return tmp_path


def test_model_and_dataset_load_from_the_published_folder(finished_run):
    out = finished_run / "release"
    assert main(["--iteration", "2", "--out", str(out)]) == 0
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    trained = AutoModelForImageTextToText.from_pretrained(Paths("2").policy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    AutoProcessor.from_pretrained(out / "model")
    pairs = datasets.load_dataset(str(out / "dataset"), cache_dir=str(finished_run / "cache"))
    assert {name: len(split) for name, split in pairs.items()} == {"round_1": 1, "round_2": 2}
    row = pairs["round_2"][0]
    assert (row["chosen"], row["rejected"], row["chosen_score"]) == ("a dog", "a cat", 0)
    assert row["image"].size == (24, 24)


def test_the_cards_hold_the_numbers_and_the_limits_of_the_run(finished_run):
    out = finished_run / "release"
    main(["--iteration", "2", "--out", str(out), "--license", "apache-2.0"])
    card = ModelCard.load(out / "model" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-text-to-text"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["response_hallucination"] == 10.0
    for text in ("| base | 40.0 (38.0–42.0) |", "| round 2 | 10.0 (8.0–12.0) |", "2.0 points below", "color: 95.0 %"):
        assert text in card.text
    assert json.loads((out / "model" / "metrics.json").read_text())["1"]["recall"] == 0.92
    assert (out / "model" / "training_params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert "3 pairs" in DatasetCard.load(out / "dataset" / "README.md").text


def test_an_earlier_round_is_published_with_its_own_data_only(finished_run):
    out = finished_run / "release"
    assert main(["--iteration", "1", "--out", str(out)]) == 0
    assert [f.name for f in (out / "dataset" / "data").iterdir()] == ["round_1.parquet"]
    assert "round 2" not in (out / "model" / "README.md").read_text()


def test_what_cannot_be_published_is_one_clear_line_and_leaves_nothing(finished_run, capsys):
    (Paths("1").results / "test.json").unlink()
    for iteration, out, message in (
        ("7", "new", "no iteration '7'"),
        ("1", "new", "round 1 has not run"),
        ("2", "new", "round 1 has not run"),
    ):
        assert main(["--iteration", iteration, "--out", str(finished_run / out)]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
        assert not (finished_run / out).exists()


def test_nothing_is_overwritten(finished_run, capsys):
    out = finished_run / "release"
    main(["--iteration", "1", "--out", str(out)])
    before = (out / "model" / "README.md").read_bytes()
    assert main(["--iteration", "2", "--out", str(out)]) == 1
    assert "give another --out" in capsys.readouterr().err
    assert (out / "model" / "README.md").read_bytes() == before
