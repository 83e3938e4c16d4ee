"""The store survives a kill at any moment, and every row is accounted for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.fingerprint import digest_files
from rlaifv.records import Reject, batched, read_jsonl, write_atomic, write_jsonl
from rlaifv.store import Store, TooManyRejects

CHUNKS = [[1, 2], [3, 4], [5]]


def work(store: Store, stop_after: int | None = None) -> int:
    done = 0
    for index, chunk in store.pending(CHUNKS):
        if done == stop_after:
            break
        store.write(index, [{"n": n} for n in chunk])
        done += 1
    return done


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(tmp_path):
    whole = Store("stage", {"seed": 1}, tmp_path / "a")
    work(whole)
    whole.publish(tmp_path / "whole.jsonl", 5, 0)
    work(Store("stage", {"seed": 1}, tmp_path / "b"), stop_after=1)
    again = Store("stage", {"seed": 1}, tmp_path / "b")
    assert work(again) == 2, "the finished chunk must not be done twice"
    again.publish(tmp_path / "again.jsonl", 5, 0)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_work_of_another_model_is_never_taken_up(tmp_path):
    work(Store("stage", {"model": "a"}, tmp_path), stop_after=2)
    assert work(Store("stage", {"model": "b"}, tmp_path)) == 3


def test_a_half_written_chunk_counts_as_not_done(tmp_path):
    store = Store("stage", {}, tmp_path)
    (store.folder / "000000.jsonl.partial").write_text('row {"n"')
    assert work(store) == 3


def test_rows_and_rejects_are_published_side_by_side(tmp_path):
    store = Store("stage", {}, tmp_path / "scratch")
    store.write(0, [{"n": 1}], [Reject("x", "stage", "no such image")])
    assert store.publish(tmp_path / "rows.jsonl", 2, 0.5) == (1, 1)
    assert read_jsonl(tmp_path / "rejects.jsonl") == [{"id": "x", "stage": "stage", "reason": "no such image"}]


def test_too_many_rejects_stop_the_run_with_the_reason(tmp_path):
    store = Store("stage", {}, tmp_path / "scratch")
    store.write(0, [], [Reject("x", "stage", "no such image")])
    with pytest.raises(TooManyRejects, match=r"1 of 2 rows rejected.*no such image"):
        store.publish(tmp_path / "rows.jsonl", 2, 0.4)
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_broken_line_is_named_by_file_and_number(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON"):
        read_jsonl(tmp_path / "rows.jsonl")


text = st.text(st.characters(blacklist_categories=("Cs",)))


@given(rows=st.lists(st.dictionaries(text, text)))
def test_json_lines_round_trip_any_text(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows


@given(rows=st.lists(st.dictionaries(text, text), min_size=1), size=st.integers(1, 4))
def test_the_store_keeps_any_text(tmp_path_factory, rows, size):
    folder = tmp_path_factory.mktemp("store")
    store = Store("stage", {}, folder / "scratch")
    for index, chunk in store.pending(batched(rows, size)):
        store.write(index, chunk)
    store.publish(folder / "rows.jsonl", len(rows), 0)
    assert read_jsonl(folder / "rows.jsonl") == rows


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, json.dumps(1))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, json.dumps(2))
    assert path.read_text() == "1"


def test_a_digest_changes_with_an_image_that_keeps_its_name_and_a_missing_one_is_left_to_the_stage(tmp_path):
    image = tmp_path / "a.png"
    missing = digest_files(image)
    image.write_bytes(b"one")
    first = digest_files(image)
    image.write_bytes(b"two")
    assert len({missing, first, digest_files(image)}) == 3
