"""Kills and broken files at any point of a training run: what is published is always whole, and it is all of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from training_runs import PARAMS, digests, folder, run

from rlaifv.training import checkpoints, job, run_folder
from rlaifv.training.reference import ReferenceStore

__all__ = ["folder"]  # a fixture: pytest finds it by its name in this module


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, str]:
    """The bytes of a run that nothing happened to."""
    run(folder, "expected")
    return digests(folder / "expected" / "out")


def scratch(folder: Path, name: str) -> Path:
    return next((folder / name / "scratch").glob("train-*/job.json")).parent


def kill_at(monkeypatch, owner, name: str, call: int) -> None:
    """Die before the given call of a function, counted from 0."""
    original, calls = getattr(owner, name), iter(range(10_000))

    def dying(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


def finished_run(folder: Path, name: str) -> Path:
    """A copy of the finished run's scratch and output, under another name."""
    shutil.copytree(folder / "expected", folder / name)
    return scratch(folder, name)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (run_folder, "remove", 0),
        (run_folder, "remove", 1),
        (run_folder, "remove", 4),
        (run_folder, "link_or_copy", 0),
        (run_folder, "link_or_copy", 7),
        (Path, "rename", 0),
        (Path, "rename", 2),
        (run_folder, "remove", 6),  # what the run no longer needs
        (run_folder, "remove", 7),
        (shutil, "rmtree", 2),
    ],
)
def test_a_kill_while_a_run_tidies_up_loses_nothing(folder, expected, monkeypatch, caplog, owner, name, call):
    key = f"tidy-{name}-{call}-{owner.__name__}"
    started = finished_run(folder, key)
    (started / "trainer" / "checkpoint-6").mkdir(parents=True)  # as it is before it is tidied up
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            run(folder, key)
    with caplog.at_level("INFO", logger="rlaifv"):
        result = run(folder, key)
    assert digests(folder / key / "out") == expected and all(Path(c).is_dir() for c in result.checkpoints)
    assert "step" not in caplog.text, "nothing is trained again"
    assert not (started / "trainer").exists()


def damage(path: Path, how: str) -> None:
    """Remove a file or folder, cut it in half, or change its first byte (of a folder: of its config.json)."""
    if how == "missing":
        run_folder.remove(path)
        return
    file = path / "config.json" if path.is_dir() else path
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if how == "cut" else b"x" + data[1:])


@pytest.mark.parametrize("target", ["checkpoint-1/model.safetensors", "checkpoint-3", "log.csv", "finished.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "garbled"])
def test_a_finished_run_with_a_broken_part_is_not_taken_for_finished(folder, expected, caplog, target, how):
    started = finished_run(folder, f"finished-{target.replace('/', '-')}-{how}")
    damage(started / target if target == "finished.json" else started / "published" / target, how)
    assert run_folder.read_finished(started, checkpoints.published(PARAMS)) is None
    assert "trained anew" in caplog.text or (target, how) == ("finished.json", "missing")
    assert not (started / "finished.json").exists()


def test_a_finished_run_with_a_broken_part_is_trained_anew_and_ends_in_the_same_bytes(folder, expected, caplog):
    started = finished_run(folder, "anew")
    damage(started / "published" / "checkpoint-1" / "model.safetensors", "garbled")
    run(folder, "anew")
    assert digests(folder / "anew" / "out") == expected and "trained anew" in caplog.text


def test_a_second_call_publishes_again_at_once(folder, expected, monkeypatch):
    finished_run(folder, "again")
    shutil.rmtree(folder / "again" / "out")
    monkeypatch.setattr(job, "run_job", None)  # would be called to train
    assert run(folder, "again").steps == 6 and digests(folder / "again" / "out") == expected


def test_nothing_in_out_is_removed_for_a_run_that_is_not_whole(folder, expected):
    started = finished_run(folder, "half")
    (started / "published" / "checkpoint-2" / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"nothing is published .*checkpoint-2/model\.safetensors is not as"):
        run_folder.publish(started, folder / "half" / "out")
    assert digests(folder / "half" / "out") == expected


def test_of_a_run_that_fails_all_that_is_whole_is_published(folder, expected):
    started = finished_run(folder, "failed")
    damage(started / "published" / "checkpoint-2", "cut")
    run_folder.publish(started, folder / "failed" / "out", unfinished=True)
    assert sorted(path.name for path in (folder / "failed" / "out").iterdir()) == [
        *("checkpoint-1", "checkpoint-3", "checkpoint-4", "log.csv")
    ]


def test_a_run_that_another_process_trains_is_left_alone(folder, expected):
    started = finished_run(folder, "locked")
    with FileLock(f"{started}.lock"), pytest.raises(RuntimeError, match="another process is at this work in"):
        run(folder, "locked")


@pytest.fixture(scope="module")
def killed(folder, expected) -> Path:
    """A run that died in step 5, after checkpoint 2 of 4 and with a state of the Trainer after step 4."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(run.__code__.co_filename).parent)!r})
import training_runs
from pathlib import Path
from rlaifv.training.dpo import Watch
def die(self, args, state, control, **kwargs):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Watch.on_step_begin = die
training_runs.run(Path({str(folder)!r}), "killed")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(job.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (scratch(folder, "killed") / "trainer" / "checkpoint-4").is_dir()
    return folder / "killed"


@pytest.mark.parametrize(
    ("target", "how"),
    [
        ("trainer/checkpoint-4/optimizer.pt", "missing"),
        ("trainer/checkpoint-4/scheduler.pt", "missing"),
        ("trainer/checkpoint-4/rng_state.pth", "missing"),
        ("trainer/checkpoint-4/model.safetensors", "cut"),
        ("trainer/checkpoint-4/trainer_state.json", "cut"),
        ("published/checkpoint-1/model.safetensors", "garbled"),
        ("published/checkpoint-2", "missing"),
        ("whole.json", "cut"),
    ],
)
def test_a_broken_state_is_never_resumed_from(folder, killed, caplog, target, how):
    key = f"broken-{Path(target).name}-{how}"
    shutil.copytree(killed, folder / key)
    started = scratch(folder, key)
    damage(started / target, how)
    assert run_folder.go_on_from(started) is None and "starting anew" in caplog.text
    assert not list((started / "trainer").glob("*")) and not list((started / "published").glob("*"))


def test_a_run_whose_state_is_broken_starts_anew_and_ends_in_the_same_bytes(folder, expected, killed, caplog):
    shutil.copytree(killed, folder / "no-optimizer")
    damage(scratch(folder, "no-optimizer") / "trainer" / "checkpoint-4" / "optimizer.pt", "missing")
    with caplog.at_level("INFO", logger="rlaifv"):
        run(folder, "no-optimizer")
    assert "starting anew" in caplog.text and "resuming from checkpoint-4" not in caplog.text
    assert digests(folder / "no-optimizer" / "out") == expected


def test_the_next_older_whole_state_is_resumed_from(tmp_path, caplog):
    for part in ("published/checkpoint-1", "trainer/checkpoint-2", "published/checkpoint-2", "trainer/checkpoint-4"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "weights").write_text(part)
        run_folder.record_whole(tmp_path, part)
    (tmp_path / "trainer" / "checkpoint-6").mkdir()  # half-written
    assert run_folder.go_on_from(tmp_path) == tmp_path / "trainer" / "checkpoint-4"
    assert not (tmp_path / "trainer" / "checkpoint-6").exists() and not caplog.records
    (tmp_path / "trainer" / "checkpoint-4" / "weights").write_text("other")
    assert run_folder.go_on_from(tmp_path) == tmp_path / "trainer" / "checkpoint-2"
    assert not (tmp_path / "published" / "checkpoint-2").exists(), "it is made again"
    assert "not resuming from trainer/checkpoint-4: checkpoint-4/weights is not as it was written" in caplog.text


@pytest.mark.parametrize("how", ["cut", "garbage", "other pairs", "garbled number"])
def test_a_broken_reference_is_computed_again(tmp_path, caplog, how):
    store = ReferenceStore(tmp_path, {"policy": "a"}, ["0:7", "1:8"])
    logps = np.array([[-1.0, -2.0], [-3.0, -4.0]])
    store.save(logps)
    data = store.path.read_bytes()
    if how == "cut":
        store.path.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        store.path.write_bytes(b"garbage")
    elif how == "other pairs":
        other = ReferenceStore(tmp_path, {"policy": "a"}, ["0:7"])
        other.save(logps[:, :1])
        other.path.rename(store.path)
    elif how == "garbled number":
        store.path.write_bytes(data.replace(b"-3.0", b"-5.0"))
    assert store.load() is None
    assert "computing them again" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_reference_that_is_not_finite_is_not_kept(tmp_path, number):
    store = ReferenceStore(tmp_path, {"policy": "a"}, ["0:7", "1:8"])
    with pytest.raises(ValueError, match=rf"logps\[1\]\[0\] is {number}"):
        store.save(np.array([[-1.0, -2.0], [float(number), -4.0]]))
    assert store.load() is None


def test_a_reference_that_is_not_finite_stops_the_run_with_pair_ids(folder, monkeypatch):
    original = job.PairScorer.forward

    def broken(self, batch):
        scores = original(self, batch)
        return {**scores, "logps": scores["logps"] * np.nan}

    monkeypatch.setattr(job, "choose_layout", lambda scorer, vlm, data, params: choose(scorer, data))
    monkeypatch.setattr(job.PairScorer, "forward", broken)
    with pytest.raises(FloatingPointError, match=r"reference log-probs of 13 pairs are not finite: 0:100"):
        run(folder, "no-reference")


def choose(scorer, data) -> str:
    from rlaifv.training.vision_features import ImageInputs

    scorer.images = ImageInputs(data)
    return "packed"


def test_a_run_promises_its_checkpoints_and_its_log():
    assert checkpoints.published(PARAMS)[0] == "published/checkpoint-1"
    assert [*map(Path, checkpoints.published(PARAMS))][-1] == Path("published/log.csv")
    assert len(checkpoints.published(PARAMS)) == PARAMS.epochs * PARAMS.checkpoints_per_epoch + 1
