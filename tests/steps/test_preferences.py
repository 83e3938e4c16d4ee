"""People's preferences, pairs of ours, and which images are held out."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaifv.steps.preferences import Preference, hold_out, read_preferences


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def row(**changes) -> dict:
    return {
        "id": "77",
        "image": "a.jpg",
        "conversations": said("<image>\nWhat is it?", "A cat."),
        "output_1": {"from": "gpt", "value": "A dog."},
        "output_2": {"from": "gpt", "value": "A cat on a mat."},
        "preference": 2,
        "hallucination": True,
        **changes,
    }


def human(folder: Path, *rows) -> Path:
    (folder / "a.jpg").write_bytes(b"")
    path = folder / "people.json"
    path.write_text(json.dumps(list(rows)))
    return path


def test_peoples_preferences_keep_their_turns_and_their_hallucination_flag(tmp_path):
    turns = said("Is it a cat?\n<image>", "Yes.", "Where is it?", "replaced")
    path = human(tmp_path, row(), row(conversations=turns, preference=1, hallucination=False))
    (one, two), rejects = read_preferences(path, tmp_path)
    assert one == Preference("0:77", "a.jpg", ["What is it?"], "A cat on a mat.", "A dog.", "hallucination")
    assert two.conversation == ["Is it a cat?", "Yes.", "Where is it?"]
    assert (two.chosen, two.rejected, two.kind) == ("A dog.", "A cat on a mat.", "no hallucination")
    assert not rejects


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(image="gone.jpg"), "gone.jpg does not exist"),
        (row(image="../a.jpg"), "lies outside"),
        (row(preference=3), "preference is 3, expected 1 or 2"),
        (row(output_2={"value": "A dog."}), "both answers are the same"),
        (row(output_2={"value": " "}), "is empty or no text"),
        (row(conversations=said("a", "b", "c")[1:]), "turns are of gpt, human"),
        (row(conversations=[]), "expected human and gpt in turn"),
        ({"id": "5"}, "is no preference: it lacks 'conversations'"),
        ("text", "is no preference"),
    ],
)
def test_a_row_that_is_no_preference_is_rejected_by_its_id(tmp_path, bad, reason):
    kept, (reject,) = read_preferences(human(tmp_path, row(), bad), tmp_path)
    assert len(kept) == 1 and reject.id.startswith("1:") and reason in reject.reason


def test_a_file_without_preferences_stops_with_the_first_reason(tmp_path):
    with pytest.raises(ValueError, match=r"people.json holds no usable preference: preference is 0"):
        read_preferences(human(tmp_path, row(preference=0)), tmp_path)
    (tmp_path / "people.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="expected a list of rows, got dict"):
        read_preferences(tmp_path / "people.json", tmp_path)


def test_pairs_of_ours_are_preferences_whose_kind_is_their_gap(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    cells = {"image": {"bytes": b"x", "path": "a.jpg"}, "image_path": "a.jpg", "question": "What?", "idx": 4}
    rows = [
        cells | {"chosen": "cat", "rejected": "dog", "chosen_score": -1, "rejected_score": -4},
        cells | {"chosen": "cat", "rejected": "cat", "chosen_score": 0, "rejected_score": -4},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    kept, (reject,) = read_preferences(tmp_path / "pairs.parquet", tmp_path)
    assert kept == [Preference("0:4", "a.jpg", ["What?"], "cat", "dog", "3 claims apart")]
    assert reject.id == "1:4" and "same answer" in reject.reason


def test_no_image_is_both_learned_from_and_held_out():
    one = Preference("", "", ["What?"], "a", "b")
    many = [replace(one, id=str(i), image_path=f"{i % 200}.jpg") for i in range(600)]
    learn, held = hold_out(many, 0.4, seed=1)
    assert len(learn) + len(held) == 600 and not {p.image_path for p in learn} & {p.image_path for p in held}
    assert 60 <= len({p.image_path for p in held}) <= 100
    assert hold_out(many[::-1], 0.4, seed=1)[1][::-1] == held, "drawn for each image alone"
    assert hold_out(many, 0.4, seed=2)[1] != held
