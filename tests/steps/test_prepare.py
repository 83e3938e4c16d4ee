"""Bad rows go to the rejects with their reason, and rounds take fixed parts."""

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rlaifv.records import Instruction, read_records, write_jsonl
from rlaifv.steps.prepare import in_iteration_order, parse_instruction, read_instructions, take_iteration
from rlaifv.store import TooManyRejects, check_rejects
from rlaifv.vlm.images import decode_image, open_image

ORIGINAL = {"ds_question_id": "a.jpg", "image_path": "good.jpg", "question": "What?"}


@pytest.fixture
def folder(tmp_path):
    Image.effect_noise((32, 24), 60).convert("RGB").save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture at all")
    Image.new("RGB", (8, 8)).save(tmp_path / "drawing.jpg", "EPS")
    Image.new("L", (5000, 1)).save(tmp_path / "line.png")
    Image.new("F", (8, 8)).save(tmp_path / "float.tiff")
    elsewhere = tmp_path.with_name(tmp_path.name + "-elsewhere")
    elsewhere.mkdir()
    (elsewhere / "good.jpg").write_bytes(data)
    (tmp_path / "link.jpg").symlink_to(elsewhere / "good.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
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
            "text.png cannot be decoded: it is no JPEG, PNG",
        ),
        ({"id": "a", "image_path": "good.jpg", "question": "  "}, "the question is empty"),
        ({"id": "ok", "image_path": "good.jpg", "question": "What?"}, "the id 'ok' was used before"),
        ({"id": "a", "question": "What?"}, "has no field 'image_path'"),
        ({"id": "a", "image_path": "good.jpg", "question": None}, "has no field 'question'"),
        (["a", "good.jpg", "What?"], "is no object with fields"),
        ("\ud800", "is no object with fields: '\\ud800'"),
        ({"id": "a", "image_path": "good.jpg", "question": ["What?"]}, "question is ['What?'], expected text"),
        ({"id": "a", "image_path": "good.jpg", "question": math.nan}, "question is nan, expected text"),
        ({"id": False, "image_path": "good.jpg", "question": "What?"}, "id is False, expected text"),
        ({"id": {"a": 1}, "image_path": "good.jpg", "question": "What?"}, "id is {'a': 1}, expected text"),
        ({"id": " ", "image_path": "good.jpg", "question": "What?"}, "the id is empty"),
        (
            {"id": "a", "image_path": "good.jpg", "question": "What \ud800?"},
            r"question holds half a character, '\ud800'",
        ),
        ({"id": "\udfff", "image_path": "good.jpg", "question": "What?"}, "id holds half a character"),
        ({"id": "a", "image_path": "\ud800", "question": "What?"}, "image_path holds half a character"),
        ({"id": "a", "image_path": "a\0b", "question": "What?"}, "null byte"),
        ({"id": "a", "image_path": "a" * 5000, "question": "What?"}, "File name too long"),
        ({"id": "a", "image_path": "good.jpg", "question": "<image>\n"}, "the question is empty"),
        (ORIGINAL | {"metainfos": ["x"]}, "metainfos is ['x'], expected an object"),
        (ORIGINAL | {"metainfos": "x"}, "metainfos is 'x', expected an object"),
        ({"id": "a", "image_path": "/etc/hostname", "question": "What?"}, "/etc/hostname lies outside"),
        ({"id": "a", "image_path": "../good.jpg", "question": "What?"}, "../good.jpg lies outside"),
        ({"id": "a", "image_path": "link.jpg", "question": "What?"}, "link.jpg lies outside"),
        ({"id": "a", "image_path": "loop.jpg", "question": "What?"}, "loop.jpg does not exist"),
        ({"id": "a", "image_path": "drawing.jpg", "question": "What?"}, "drawing.jpg cannot be decoded: it is no JPEG"),
        ({"id": "a", "image_path": "line.png", "question": "What?"}, "line.png has 5000x1 pixels: a side must have 4"),
        ({"id": "a", "image_path": "float.tiff", "question": "What?"}, "float.tiff has 32-bit values"),
    ],
)
def test_a_bad_row_is_rejected_with_its_place_and_reason_and_the_others_stay(folder, row, reason):
    good = {"id": "ok", "image_path": "good.jpg", "question": "What is it?"}
    kept, rejects = instructions(folder, good, row)
    assert [i.id for i in kept] == ["ok"]
    assert len(rejects) == 1
    assert "rows.jsonl:2" in rejects[0].reason and reason in rejects[0].reason


def test_the_folder_of_images_may_be_a_link_itself(folder):
    link = folder.with_name(folder.name + "-link")
    link.symlink_to(folder)
    row = {"id": "a", "image_path": "good.jpg", "question": "What?"}
    kept, rejects = instructions(link, row, row | {"id": "b", "image_path": "link.jpg"})
    assert [i.id for i in kept] == ["a"] and "link.jpg lies outside" in rejects[0].reason


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


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"id": ' + "1" * 5000 + "}", "{", '{"id": "a"} {}', "[" * 980 + "]" * 980]
)
def test_a_line_that_is_no_row_is_rejected_and_not_the_file(folder, line):
    good = json.dumps({"id": 7, "image_path": "good.jpg", "question": "What is it?"})
    (folder / "rows.jsonl").write_text(f"{line}\n{good}\n", encoding="utf-8-sig")
    kept, rejects = read_instructions(folder / "rows.jsonl", folder)
    assert [i.id for i in kept] == ["7"], "a byte order mark is no row, and a whole number is an id"
    assert [reject.id for reject in rejects] == ["rows.jsonl:1"]


@pytest.mark.parametrize("asked", ["<image>\nWhat is it?", "What is it?\n<image>", " <image> <image>What is it?"])
def test_the_place_of_the_image_in_llavas_files_is_no_part_of_the_question(asked):
    assert parse_instruction({"id": "a", "image_path": "a.jpg", "question": asked}).question == "What is it?"
    assert parse_instruction({"id": "a", "image_path": "a.jpg", "question": "Is <image> a tag?"}).question[3] == "<"


field = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
field |= st.lists(st.text(max_size=3), max_size=2) | st.sampled_from(["good.jpg", "../x", "<image>", "What?"])
names = st.sampled_from(
    ["id", "image_path", "question", "reference", "source", "ds_question_id", "metainfos", "ds_name"]
)


@settings(max_examples=40)
@given(rows=st.lists(st.dictionaries(names, field) | field, max_size=6))
def test_any_row_is_kept_or_rejected_and_both_can_be_written(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "good.jpg").is_file():
        Image.new("RGB", (8, 8)).save(folder / "good.jpg")
    kept, rejects = instructions(folder, *rows)
    assert len(kept) + len(rejects) == len(rows)
    write_jsonl(folder / "kept.jsonl", kept)
    write_jsonl(folder / "rejects.jsonl", rejects)
    assert read_records(folder / "kept.jsonl", Instruction) == kept


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_keeps_its_shades(kind):
    stream, shades = io.BytesIO(), np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades * 257).save(stream, kind)
    assert np.array_equal(np.asarray(decode_image(stream.getvalue(), "gray"))[..., 0], shades)


@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
def test_garbled_bytes_are_a_picture_or_one_line(data, kind):
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((16, 12)).save(stream, kind)
    content = bytearray(stream.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(content[: data.draw(st.integers(0, len(content)))]), "x.png").mode == "RGB"
    except ValueError as error:
        assert str(error).startswith("image x.png ") and "0x7" not in str(error)
