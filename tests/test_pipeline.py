"""The pipeline as a user meets it: killed in the middle and continued, it gives the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from checkout import copy_repository, environment, run


def small(content) -> None:
    content["world"].update(train=24, dev=4, test=4)
    content["prepare"].update(per_iteration=12)
    content["generate"].update(samples=4, batch_size=2)
    content["divide"].update(batch_size=8)
    content["feedback"].update(batch_size=2)
    content["report"].update(gallery=1)


def repository(folder: Path) -> Path:
    copy_repository(folder, small)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    run(folder, "dvc", "init", "-q")
    run(folder, "dvc", "config", "core.analytics", "false")
    run(folder, "dvc", "config", "core.check_update", "false")
    return folder


def kill_when(folder: Path, pattern: str, timeout: float = 240) -> None:
    """Start `dvc repro feedback@1` and kill -9 it and its children when a scratch file of that pattern appears."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "feedback@1"],
        cwd=folder,
        env=environment(folder),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + timeout
    while not list((folder / "scratch").glob(pattern)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert list((folder / "scratch").glob(pattern)), f"no {pattern} before the run ended"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # the kernel has a session of its own and would go on
    subprocess.run(["pkill", "-9", "-f", f"ipykernel_launcher.*{folder.name}"], check=False)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == folder and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, PermissionError):
            continue


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "data").rglob("*")) if p.is_file()}


def test_a_dvc_run_killed_in_generate_and_in_feedback_continues_to_the_same_bytes(tmp_path):
    whole, killed = repository(tmp_path / "whole"), repository(tmp_path / "killed")
    run(whole, "dvc", "repro", "feedback@1")
    kill_when(killed, "generate@1-*/*.jsonl")
    kill_when(killed, "feedback@1-*/*.jsonl")
    run(killed, "dvc", "repro", "feedback@1")
    assert contents(killed) == contents(whole)
    assert "data/iterations/1/judgements/judgements.jsonl" in contents(whole)
    again = run(whole, "dvc", "repro", "feedback@1")
    assert "Running stage" not in again, "nothing has changed"
