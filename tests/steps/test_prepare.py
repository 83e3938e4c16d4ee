"""Bad rows go to the rejects with their reason, and rounds take fixed parts."""

import json

import pytest
from PIL import Image

from rlaifv.records import Instruction
from rlaifv.steps.prepare import in_iteration_order, parse_instruction, read_instructions, take_iteration
from rlaifv.store import TooManyRejects, check_rejects
from rlaifv.vlm.images import open_image


@pytest.fixture
def folder(tmp_path):
    Image.effect_noise((32, 24), 60).convert("RGB").save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture at all")
    return tmp_path


def instructions(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_instructions(path, folder)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "a", "image_path": "gone.jpg", "question": "What?"}, "gone.jpg does not exist"),
        ({"id": "a", "image_path": "cut.jpg", "question": "What?"}, "cut.jpg cannot be decoded"),
        (
            {"id": "a", "image_path": "text.png", "question": "What?"},
            "text.png cannot be decoded: it is in no known",
        ),
        ({"id": "a", "image_path": "good.jpg", "question": "  "}, "the question is empty"),
        ({"id": "ok", "image_path": "good.jpg", "question": "What?"}, "the id 'ok' was used before"),
        ({"id": "a", "question": "What?"}, "has no field 'image_path'"),
        ({"id": "a", "image_path": "good.jpg", "question": None}, "has no field 'question'"),
        (["a", "good.jpg", "What?"], "is no object with fields"),
    ],
)
def test_a_bad_row_is_rejected_with_its_place_and_reason_and_the_others_stay(folder, row, reason):
    good = {"id": "ok", "image_path": "good.jpg", "question": "What is it?"}
    kept, rejects = instructions(folder, good, row)
    assert [i.id for i in kept] == ["ok"]
    assert len(rejects) == 1
    assert "rows.jsonl:2" in rejects[0].reason and reason in rejects[0].reason


def test_too_many_bad_rows_stop_the_run(folder):
    kept, rejects = instructions(folder, {"id": "a", "image_path": "gone.jpg", "question": "What?"})
    with pytest.raises(TooManyRejects, match=r"prepare\.max_reject_rate"):
        check_rejects("prepare", rejects, len(kept) + len(rejects), 0.5)


def test_the_original_instruction_file_is_read_as_it_is():
    row = {
        "ds_question_id": "./imgs/a.jpg",
        "image_path": "./imgs/a.jpg",
        "question": "Describe.",
        "metainfos": {"reference": "Landmark Name: X"},
    }
    first = parse_instruction(row)
    other = parse_instruction({**row, "question": "Where is it?"})
    assert first.reference == "Landmark Name: X"
    assert first.id != other.id, "two questions about one image are two instructions"


def test_a_later_round_does_not_change_an_earlier_part():
    rows = [Instruction(str(i), "a", "b") for i in range(30)]
    order = in_iteration_order(rows, seed=1)
    assert take_iteration(order, 1, 10) + take_iteration(order, 2, 10) + take_iteration(order, 3, 10) == order
    assert in_iteration_order(list(reversed(rows)), seed=1) == order
    with pytest.raises(ValueError, match="iteration 4 needs instructions 30 to 40"):
        take_iteration(order, 4, 10)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="9000x9000 pixels"):
        open_image(tmp_path / "huge.png")
