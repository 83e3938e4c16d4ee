"""Instruction files out of the public dataset and of COCO with published prompts."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlaifv.records import read_jsonl
from rlaifv.steps.instructions import from_coco, from_public, main
from rlaifv.steps.prepare import read_instructions


def picture(color: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def public(path, rows):
    """A parquet file in the public dataset's columns."""
    fill = {"ds_name": "RLAIF-V", "chosen": "a", "rejected": "b", "origin_dataset": "VQAv2", "origin_split": "{}"}
    pq.write_table(pa.Table.from_pylist([{**fill, "idx": i, **row} for i, row in enumerate(rows)]), path)
    return path


@pytest.fixture
def dataset(tmp_path):
    cat, dog = ({"bytes": picture(c), "path": f"{c}.jpg"} for c in (10, 200))
    return public(
        tmp_path / "one.parquet",
        [
            {"image": cat, "question": "What is it?"},
            {"image": cat, "question": "What is it?"},
            {"image": cat, "question": "Describe it."},
            {"image": dog, "question": "Describe it."},
            {"image": dog, "question": " "},
            {"image": {"bytes": b"no picture", "path": "x"}, "question": "What?"},
        ],
    )


def test_every_pair_of_image_and_question_is_an_instruction_once_and_counts_add_up(dataset, tmp_path):
    counts = from_public([dataset], tmp_path / "images", tmp_path / "train.jsonl")
    assert counts == {"read": 6, "written": 3, "repeated": 1, "unusable": 2}
    kept, rejects = read_instructions(tmp_path / "train.jsonl", tmp_path / "images")
    assert [i.question for i in kept] == ["What is it?", "Describe it.", "Describe it."] and rejects == []
    assert len({i.image_path for i in kept}) == 2 == len(list((tmp_path / "images").rglob("*.jpg")))
    assert {i.source for i in kept} == {"VQAv2"}


def test_image_bytes_are_the_published_ones(dataset, tmp_path):
    from_public([dataset], tmp_path / "images", tmp_path / "train.jsonl")
    assert {path.read_bytes() for path in (tmp_path / "images").rglob("*.jpg")} == {picture(10), picture(200)}


def test_the_same_files_give_the_same_bytes_and_a_limit_ends_early(dataset, tmp_path):
    for name in ("a", "b"):
        from_public([dataset], tmp_path / name, tmp_path / f"{name}.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert from_public([dataset], tmp_path / "a", tmp_path / "c.jsonl", limit=2)["read"] == 3


def test_the_older_release_with_json_in_text_is_read_too(tmp_path):
    text = json.dumps({"question": "Where?", "chosen": "Here.", "rejected": "There."})
    pq.write_table(
        pa.Table.from_pylist([{"image": {"bytes": picture(5, "PNG"), "path": "x"}, "text": text}]),
        tmp_path / "old.parquet",
    )
    from_public([tmp_path / "old.parquet"], tmp_path / "images", tmp_path / "train.jsonl")
    (row,) = read_jsonl(tmp_path / "train.jsonl")
    assert row["question"] == "Where?" and row["image_path"].endswith(".png")


def test_another_parquet_is_one_line_with_its_columns(tmp_path, capsys):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(SystemExit) as stop:
        main(["public", str(tmp_path / "other.parquet"), "--out", str(tmp_path / "x.jsonl")])
    assert "has no column image, question; its columns are a" in str(stop.value)


@pytest.fixture
def coco(tmp_path):
    """Twelve images, of which one has no object and one is Object HalBench's own."""
    folder = tmp_path / "coco"
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(1, 13)]
    for image in images:
        (folder / "val2014" / image["file_name"]).write_bytes(picture(image["id"]))
    annotations = [{"image_id": i, "category_id": 1} for i in range(1, 12)]
    (folder / "annotations" / "instances_val2014.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    rows = [{"image_id": 3, "question": "Describe the image."}, {"image_id": 99, "question": "What do you see?"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_dev_and_test_share_no_image_and_take_none_of_the_benchmark(coco, tmp_path):
    files = from_coco(coco, tmp_path / "prompts.jsonl", tmp_path / "images", {"dev": 4, "test": 6})
    dev, test = (read_instructions(files[name], tmp_path / "images")[0] for name in ("dev", "test"))
    assert (len(dev), len(test)) == (4, 6)
    assert {i.id for i in dev} | {i.id for i in test} == {str(i) for i in range(1, 12) if i != 3}
    assert {i.question for i in dev + test} == {"Describe the image.", "What do you see?"}


def test_too_few_images_and_a_missing_one_are_said(coco, tmp_path):
    with pytest.raises(ValueError, match="has 10 images with objects that are free, not 11"):
        from_coco(coco, tmp_path / "prompts.jsonl", tmp_path / "images", {"dev": 5, "test": 6})
    for path in (coco / "val2014").iterdir():
        path.unlink()
    with pytest.raises(SystemExit) as stop:
        main(["coco", str(coco), "--prompts", str(tmp_path / "prompts.jsonl"), "--dev", "1", "--test", "1"])
    assert "unpack COCO's val2014.zip" in str(stop.value)
