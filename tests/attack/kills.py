"""Kills at random moments of `dvc repro`, and inside train's clean-up: the same bytes in the end."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from checkout import dvc_repository, environment
from harness import Attempts, Case
from stages import NAMED, contents, copy_run, end_all, kernel_of, make_checkout, run_stage, same_bytes

from rlaifv.run import mend

KILLS = 6
WAYS = (
    ("group", signal.SIGKILL),
    ("group", signal.SIGINT),  # Ctrl-C
    ("group", signal.SIGTERM),  # a queue's preemption
    ("kernel", signal.SIGKILL),
    ("papermill", signal.SIGKILL),
    ("papermill", signal.SIGTERM),
    ("dvc", signal.SIGKILL),
)
LAST = "train@1"


def kill_at_random(attempts: Attempts, whole: Path) -> None:
    """A run up to training that is killed again and again; one that ends meanwhile is compared and begun anew."""
    folder, chance = dvc_repository(make_checkout(attempts.folder)), attempts.random
    for number in range(KILLS):
        who, how = WAYS[number % len(WAYS)]
        moment = chance.uniform(1, 16)
        with attempts.attack("random kills", f"{how.name} to {who} after {moment:.1f} s of processor time"):
            if repro(folder, moment, who, how):
                compare(folder, whole)
                for name in ("data", "scratch", "dvc.lock"):
                    path = folder / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with attempts.attack("random kills", "the same bytes after all of them"):
        assert repro(folder), "the run does not end well"
        compare(folder, whole)


def compare(folder: Path, whole: Path) -> None:
    """Nothing but the same bytes, in all that has been made so far."""
    ours, theirs = contents(folder), contents(whole)
    differs = sorted(name for name in ours if ours[name] != theirs.get(name))
    assert ours and not differs, f"other bytes than those of an uninterrupted run: {', '.join(differs[:3])}"
    assert any("checkpoints" in name for name in ours), "the run has trained nothing"


def repro(folder: Path, moment: float | None = None, who: str = "", how: int = 0) -> bool:
    """`dvc repro` as `make` runs it, killed after so many seconds of processor time of all its processes; True when it
    ended well. Fails when something goes on for two minutes after the kill, or when an untouched run ends badly."""
    mend(folder)
    command = [sys.executable, "-m", "dvc", "repro", LAST]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        dvc = psutil.Popen(
            command,
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        family, killed, end = [dvc], False, time.monotonic() + 1200
        while any(map(psutil.Process.is_running, alive(family))) and time.monotonic() < end:
            time.sleep(0.2)
            family = [dvc, *descendants(family)]
            if moment is not None and not killed and sum(map(used, family)) >= moment:
                send(family, who, how)
                killed, end = True, time.monotonic() + 120
        left = alive(family)
        end_all(left)
        code = dvc.wait()
        output.seek(0)
        text = output.read()
    assert not left, f"{len(left)} processes still run two minutes after the kill"
    assert killed or code == 0, text[-800:]
    return code == 0


def descendants(family: list[psutil.Process]) -> list[psutil.Process]:
    """All below the first, and those that have lost their parent."""
    found = dict.fromkeys(family[1:])
    for process in family:
        try:
            found |= dict.fromkeys(process.children(recursive=True))
        except psutil.Error:
            continue
    return [process for process in found if process.is_running()]


def alive(family: list[psutil.Process]) -> list[psutil.Process]:
    def lives(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [process for process in family if lives(process)]


def used(process: psutil.Process) -> float:
    """Seconds of processor time of a process and of its children that have ended."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.Error:
        return 0.0


def send(family: list[psutil.Process], who: str, how: int) -> None:
    """Kill one of them; where it is not there at this moment, dvc and its group."""
    kernel = kernel_of(family[0])
    if who == "group" or (who == "kernel" and kernel is None):
        os.killpg(family[0].pid, how)
    elif who == "kernel":
        kernel.send_signal(how)
    elif who == "dvc" or kernel is None:
        family[0].send_signal(how)
    else:
        kernel.parent().send_signal(how)


CLEAN_UP = (
    "rlaifv.training.run_folder publish 0",
    "rlaifv.training.run_folder remove 1",
    "rlaifv.training.run_folder link_or_copy 3",
    "rlaifv.training.run_folder tidy_up 0",
)
"""Where train is killed once it has trained, in this order: the function, and before which of its calls."""


def kill_in_clean_up(attempts: Attempts, whole: Path) -> None:
    stage, kind = NAMED["train@1"], "kill inside train's clean-up"
    folder = copy_run(whole, attempts.folder, stage)
    for place in CLEAN_UP:
        with attempts.attack(kind, f"before {place}"):
            done = run_stage(folder, stage, ATTACK_FAULT=f"kill {place}")
            assert "the kernel was killed" in done.one_line(stage.notebook)
    with attempts.attack(kind, "the same bytes after all of them"):
        done = run_stage(folder, stage)
        assert done.code == 0, done.text[-800:]
        same_bytes(folder, whole, stage.outs)


KILL_CASES = [
    Case("kills of dvc repro", ("random kills",), kill_at_random),
    Case("kills inside train's clean-up", ("kill inside train's clean-up",), kill_in_clean_up),
]
