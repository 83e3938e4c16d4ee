"""Pairs that somebody else has made are read as every release has them, and what cannot be used is counted."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaifv.steps.public_pairs import count_pairs, first_pair, parquet_files, public_rows
from rlaifv.training.pair_data import read_rows

TEXTS = {"question": "What is it?", "chosen": "A cat.", "rejected": "A cat on a mat."}
ROW = {"image": {"bytes": b"GIF8", "path": "a.gif"}, "image_path": "a.gif", "origin_split": "", **TEXTS}


def write(path, *rows, drop=()):
    table = pa.Table.from_pylist([{k: v for k, v in {**ROW, **row}.items() if k not in drop} for row in rows])
    pq.write_table(table, path)
    return path


def old(path, *texts):
    """As older releases have it: the texts are JSON in one column."""
    return write(path, *({"text": text} for text in texts), drop=TEXTS)


def test_counts_add_up_and_every_reject_has_its_reason(tmp_path):
    rows = [{}, {"chosen": " "}, {"rejected": "A cat."}, {"question": None}, {"question": "Which?"}, {"rejected": ""}]
    found = count_pairs([write(tmp_path / "a.parquet", *rows)])
    assert found["pairs"] == 2 == found["instructions_with_pairs"]
    assert found["rejects"] == {
        "chosen is empty": 1,
        "chosen and rejected are the same answer": 1,
        "question is empty": 1,
        "rejected is empty": 1,
    }
    assert (found["mean_words_chosen"], found["mean_words_rejected"]) == (2, 5)


def test_older_and_newer_files_give_the_same_rows_to_statistics_and_to_training(tmp_path):
    new, before = write(tmp_path / "1.parquet", {}), old(tmp_path / "0.parquet", json.dumps(TEXTS))
    assert list(public_rows([new], tuple(TEXTS))) == list(public_rows([before], tuple(TEXTS))) == [TEXTS]
    rows = [(question, answers.chosen, answers.rejected) for answers, question, _ in read_rows(tmp_path)]
    assert rows == [tuple(TEXTS.values())] * 2


def test_a_text_that_is_no_json_is_a_reject_and_not_the_end(tmp_path):
    file = old(tmp_path / "0.parquet", json.dumps(TEXTS), "{broken", "[1]", None)
    assert count_pairs([file])["rejects"] == {"question is empty": 3}
    assert [question for _, question, _ in read_rows(file)] == ["What is it?", None, None, None]


def test_what_origin_split_says_in_json_is_counted(tmp_path):
    split = json.dumps({"model": "m", "labeler": "l", "more": {"not": "shown"}})
    found = count_pairs([write(tmp_path / "a.parquet", {"origin_split": split}, {"origin_split": "train"})])
    assert found["made_by"] == {"model: m": 1, "labeler: l": 1}


def test_other_files_have_another_fingerprint(tmp_path):
    first, second = write(tmp_path / "a.parquet", {}), write(tmp_path / "b.parquet", {}, {})
    assert count_pairs([first])["fingerprint"] != count_pairs([first, second])["fingerprint"]


@pytest.mark.parametrize("column", ["image", "question", "chosen", "rejected"])
def test_a_file_without_a_column_is_one_line_that_names_it_and_those_there_are(tmp_path, column):
    file = write(tmp_path / "a.parquet", {}, drop=[column])
    with pytest.raises(ValueError, match=rf"a\.parquet has no column {column}; its columns are .*image_path"):
        parquet_files(file)


def test_a_plain_column_of_image_bytes_is_read(tmp_path):
    file = write(tmp_path / "a.parquet", {"image": b"GIF8"})
    assert first_pair([file])["image"]["bytes"] == b"GIF8"
    assert [image for _, _, image in read_rows(file)] == [b"GIF8"]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("a.gif", "is string"),
        ({"path": "a.gif"}, "is struct<path: string>"),
        ({"bytes": None, "path": "a.gif"}, "holds no bytes, only paths"),
    ],
)
def test_images_that_are_elsewhere_are_refused_with_file_and_column(tmp_path, image, said):
    table = pa.Table.from_pylist([{**ROW, "image": image}])
    if isinstance(image, dict) and "bytes" in image:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = table.set_column(0, "image", pa.array([image], kind))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet: its column image {said}: write the bytes"):
        parquet_files(tmp_path)


def test_nothing_to_learn_from_and_no_file_at_all_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no pair to learn from in .*a\.parquet: \{'chosen is empty': 1\}"):
        count_pairs([write(tmp_path / "a.parquet", {"chosen": ""})])
    with pytest.raises(FileNotFoundError, match=r"no parquet file of preference pairs at .*absent"):
        parquet_files(tmp_path / "absent")


def test_the_first_pair_shown_has_two_answers_and_an_image(tmp_path):
    rows = [{"chosen": ""}, {"image": {"bytes": None, "path": "x"}}, {"question": "This one?"}]
    assert first_pair([write(tmp_path / "a.parquet", *rows)])["question"] == "This one?"
