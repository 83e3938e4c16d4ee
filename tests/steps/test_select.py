"""The checkpoint is chosen on dev by hallucination among those that keep recall."""

import pytest

from rlaifv.steps.select import choose, copy_checkpoint

BASE = {"recall": 0.96}


def row(name: str, hallucination: float, recall: float) -> dict:
    return {"checkpoint": name, "response_hallucination": hallucination, "recall": recall}


def test_the_least_hallucinating_checkpoint_wins():
    assert choose([row("a", 0.3, 0.96), row("b", 0.1, 0.95)], BASE, 0.02)["checkpoint"] == "b"


def test_a_silent_model_does_not_win():
    assert choose([row("a", 0.3, 0.96), row("b", 0.0, 0.50)], BASE, 0.02)["checkpoint"] == "a"


def test_ties_go_to_the_higher_recall():
    assert choose([row("a", 0.1, 0.95), row("b", 0.1, 0.96)], BASE, 0.02)["checkpoint"] == "b"


def test_when_none_keeps_recall_the_highest_is_taken_with_a_warning(caplog):
    assert choose([row("a", 0.1, 0.5), row("b", 0.2, 0.7)], BASE, 0.02)["checkpoint"] == "b"
    assert "no checkpoint keeps recall" in caplog.text


def test_no_checkpoint_is_an_error():
    with pytest.raises(ValueError, match="no checkpoint"):
        choose([], BASE, 0.02)


def test_publishing_replaces_what_was_there_whole(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("new")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "stale.json").write_text("old")
    copy_checkpoint(tmp_path / "checkpoint", tmp_path / "policy")
    assert [p.name for p in (tmp_path / "policy").iterdir()] == ["config.json"]
