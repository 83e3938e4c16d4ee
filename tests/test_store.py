"""The store survives a kill at any moment, every row is accounted for, and nothing but the whole is published."""

import contextlib
import json
import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.records import Reject, batched, read_jsonl
from rlaifv.store import FINISHED, IncompleteWork, InUse, Store, TooManyRejects, hours_and_minutes, sweep

CHUNKS = [[1, 2], [3, 4], [5]]


class Killed(BaseException):
    """Stands for the end of the process."""


def work(store: Store, stop_after: int | None = None) -> int:
    """Run CHUNKS, perhaps only some of them; returns how many were done."""
    done = []

    def one(chunk):
        if len(done) == stop_after:
            raise Killed
        done.append(chunk)
        return [{"n": n} for n in chunk], []

    with contextlib.suppress(Killed):
        store.run(CHUNKS, one)
    return len(done)


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


def test_a_model_is_not_loaded_when_nothing_is_left_to_do(tmp_path):
    work(Store("stage", {}, tmp_path))
    Store("stage", {}, tmp_path).run(CHUNKS, lambda chunk: pytest.fail("every chunk is done"))


def test_a_half_written_chunk_counts_as_not_done(tmp_path):
    store = Store("stage", {}, tmp_path)
    (store.folder / "000000.jsonl.partial").write_text('row {"n"')
    assert work(store) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"3", b"8"),
        lambda data: data.split(b"\n", 1)[1],
        lambda data: b"\xff\xfe" + data,
        lambda data: data + data,
    ],
    ids=["empty", "cut", "changed", "first row gone", "garbled", "twice"],
)
def test_a_broken_chunk_is_made_again_with_one_line_that_says_so(tmp_path, caplog, damage):
    store = Store("stage", {}, tmp_path)
    work(store)
    file = store.folder / "000001.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    again = Store("stage", {}, tmp_path)
    assert work(again) == 1
    assert len([r for r in caplog.records if "chunk 1 is broken" in r.message]) == 1
    assert again.publish(tmp_path / "rows.jsonl", 5, 0) == (5, 0)
    assert [row["n"] for row in read_jsonl(tmp_path / "rows.jsonl")] == [1, 2, 3, 4, 5]


def test_a_part_is_never_published_as_the_whole(tmp_path):
    store = Store("stage", {}, tmp_path / "scratch")
    work(store)
    (store.folder / "000002.jsonl").unlink()  # as another profile's run once did
    with pytest.raises(IncompleteWork, match=r"1 of 3 chunks are gone .* first number 2: run the stage again"):
        store.publish(tmp_path / "rows.jsonl", 5, 0)
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_and_rejects_that_do_not_add_up_to_the_inputs_are_not_published(tmp_path):
    store = Store("stage", {}, tmp_path / "scratch")
    work(store)
    with pytest.raises(IncompleteWork, match="5 inputs with rows and 0 rejects are not the 6 inputs"):
        store.publish(tmp_path / "rows.jsonl", 6, 0)
    assert not (tmp_path / "rows.jsonl").exists()


def test_inputs_that_give_several_rows_are_counted_by_their_name(tmp_path):
    store = Store("stage", {}, tmp_path / "scratch")
    claims = [{"id": f"a/{k}", "of": "a"} for k in range(3)] + [{"id": "b/0", "of": "b"}]
    store.run([claims], lambda chunk: (chunk, [Reject("c", "stage", "no claim")]))
    assert store.publish(tmp_path / "rows.jsonl", 3, 0.5, of="of") == (4, 1)


def hold(root, ready, done) -> None:
    def wait(chunk):
        ready.set()
        done.wait(30)
        return [{"n": n} for n in chunk], []

    store = Store("stage", {"profile": "a"}, root / "scratch")
    store.run(CHUNKS, wait)
    store.publish(root / "a.jsonl", 5, 0)


def test_two_profiles_at_once_in_one_checkout_publish_all_of_their_own_rows(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(30)
    store = Store("stage", {"profile": "b"}, tmp_path / "scratch")
    work(store)
    assert store.publish(tmp_path / "b.jsonl", 5, 0) == (5, 0)
    with pytest.raises(InUse, match=r"stage: another process is at this work in .*: wait for it or stop it"):
        work(Store("stage", {"profile": "a"}, tmp_path / "scratch"))
    done.set()
    other.join(30)
    assert other.exitcode == 0
    assert [row["n"] for row in read_jsonl(tmp_path / "a.jsonl")] == [1, 2, 3, 4, 5]
    assert [row["n"] for row in read_jsonl(tmp_path / "b.jsonl")] == [1, 2, 3, 4, 5]


def test_finished_work_is_kept_until_another_stage_begins_and_unfinished_work_longer(tmp_path):
    finished, unfinished = Store("generate@1", {}, tmp_path), Store("divide@1", {}, tmp_path)
    work(finished)
    finished.publish(tmp_path / "out" / "rows.jsonl", 5, 0)
    work(unfinished, stop_after=1)
    sweep(tmp_path, "generate")
    assert (finished.folder / FINISHED).is_file(), "DVC may ask the stage once more"
    assert work(Store("generate@1", {}, tmp_path)) == 0
    sweep(tmp_path, "divide")
    assert not finished.folder.exists() and work(Store("divide@1", {}, tmp_path)) == 2


def test_what_was_begun_with_other_parameters_can_be_gone_on_with_and_what_was_finished_with_them_goes(tmp_path):
    begun, finished = Store("stage", {"seed": 1}, tmp_path), Store("stage", {"seed": 2}, tmp_path)
    work(begun, stop_after=2)
    work(finished)
    finished.publish(tmp_path / "out" / "rows.jsonl", 5, 0)
    other = Store("stage", {"seed": 3}, tmp_path)
    work(other)
    other.publish(tmp_path / "out" / "rows.jsonl", 5, 0)
    assert not finished.folder.exists() and work(Store("stage", {"seed": 1}, tmp_path)) == 1


def test_rows_and_rejects_are_published_side_by_side(tmp_path):
    store = Store("stage", {}, tmp_path / "scratch")
    store.run([0], lambda _: ([{"n": 1}], [Reject("x", "stage", "no such image")]))
    assert store.publish(tmp_path / "rows.jsonl", 2, 0.5) == (1, 1)
    assert read_jsonl(tmp_path / "rejects.jsonl") == [{"id": "x", "stage": "stage", "reason": "no such image"}]


def test_too_many_rejects_stop_the_run_with_the_reason_and_the_key(tmp_path):
    store = Store("divide@1", {}, tmp_path / "scratch")
    store.run([0], lambda _: ([{"n": 1}], [Reject("x", "stage", "no such image")]))
    with pytest.raises(TooManyRejects, match=r"1 of 2 rows rejected, more than divide\.max_reject_rate.*no such image"):
        store.publish(tmp_path / "rows.jsonl", 2, 0.4)
    assert not (tmp_path / "rows.jsonl").exists()


def test_what_was_rejected_too_often_is_tried_again_when_the_run_goes_on(tmp_path):
    broken, tried = {"b", "c"}, []

    def look(name: str):
        tried.append(name)
        return ([], [Reject(name, "stage", "no such image")]) if name in broken else ([{"n": name}], [])

    store = Store("divide@1", {}, tmp_path / "scratch")
    store.run("abc", look)
    with pytest.raises(TooManyRejects):
        store.publish(tmp_path / "rows.jsonl", 3, 0.4)
    broken.remove("c")
    store.run("abc", look)
    assert store.publish(tmp_path / "rows.jsonl", 3, 0.4) == (2, 1)
    assert tried == [*"abc", *"bc"]


text = st.text(st.characters(blacklist_categories=("Cs",)))


@given(rows=st.lists(st.dictionaries(text, text), min_size=1), size=st.integers(1, 4))
def test_the_store_keeps_any_text(tmp_path_factory, rows, size):
    folder = tmp_path_factory.mktemp("store")
    store = Store("stage", {}, folder / "scratch")
    store.run(batched(rows, size), lambda chunk: (chunk, []))
    store.publish(folder / "rows.jsonl", len(rows), 0)
    assert read_jsonl(folder / "rows.jsonl") == rows
    assert json.loads((store.folder / FINISHED).read_text())["rows"] == len(rows)


def test_times_read_as_people_say_them():
    said = [hours_and_minutes(seconds) for seconds in (0.4, 45, 130, 3599, 7500, 172800)]
    assert said == ["0 s", "45 s", "2 min", "1:00 h", "2:05 h", "48:00 h"]
