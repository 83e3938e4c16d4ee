"""Real stages of a small profile, as a user runs them, and what may be done to them while they run."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from checkout import copy_repository, environment

from rlaifv import ROOT
from rlaifv.fingerprint import stage_definition

BASE = ("00_world", "10_prepare", "12_models", "15_exam", "70_evaluate", "82_test", "84_benchmarks")
FIRST = ("20_generate", "30_divide", "40_feedback", "50_pairs", "60_train", "70_evaluate", "80_select", "82_test")
FAULTS = Path(__file__).with_name("faults")


@dataclass(frozen=True)
class Stage:
    """A stage's notebook and the iteration that it is run for, None outside the loop."""

    notebook: str
    iteration: str | None = None

    @property
    def command(self) -> list[str]:
        loop = [f"iteration={self.iteration}", "prev=0"] if self.iteration else []
        return [sys.executable, "-m", "rlaifv.run", self.notebook, *loop]

    @property
    def outs(self) -> list[str]:
        """What it writes, below the checkout; its executed notebook is left out, no two of which are equal."""
        name = self.notebook.partition("_")[2] + ("_base" if self.iteration == "0" else "")
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage_definition(name)["outs"]]
        found = [out.replace("${key}", str(self.iteration)) for out in outs]
        return [out for out in found if not out.startswith("runs/")]

    def __str__(self) -> str:
        return self.notebook.partition("_")[2] + (f"@{self.iteration}" if self.iteration else "")


STAGES = [Stage(name, "0" if name > "50" else None) for name in BASE] + [Stage(name, "1") for name in FIRST]
STAGES += [Stage("84_benchmarks", "1"), Stage("90_report")]
"""One iteration, in an order in which they can run."""

NAMED = {str(stage): stage for stage in STAGES}


def small(content) -> None:
    """Parameters with which every stage has something to do, in several chunks, and is done in seconds."""
    del content["iterations"]["2"]
    content["world"].update(train=5, dev=3, test=2)
    content["prepare"].update(per_iteration=5)
    content["generate"].update(samples=4, batch_size=2, max_new_tokens=48)
    content["divide"].update(batch_size=7)
    content["feedback"].update(batch_size=2)
    content["train"].update(epochs=2, batch_size=2, micro_batch_size=2)
    content["evaluate"].update(batch_size=2, max_new_tokens=48)
    content["report"].update(gallery=1)


def make_checkout(folder: Path, change: Callable = lambda content: None) -> Path:
    """A checkout of the small profile in which nothing has run."""

    def both(content) -> None:
        small(content)
        change(content)

    copy_repository(folder, both)
    shutil.copytree(ROOT / "metrics", folder / "metrics")
    return folder


def copy_run(whole: Path, folder: Path, without: Stage | None = None) -> Path:
    """A copy of a run, as it was before the stage `without`."""
    shutil.copytree(whole, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("scratch", "runs", "__pycache__"))
    for out in without.outs if without else ():
        path = folder / out
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def contents(folder: Path, outs: list[str] | None = None) -> dict[str, bytes]:
    """The bytes of all data, or of some outputs. The report tells minutes and memory, so no two are equal."""
    files = [file for out in outs or ["data"] for file in [folder / out, *(folder / out).rglob("*")] if file.is_file()]
    timed = ("report.html", "summary.json")
    return {str(file.relative_to(folder)): b"" if file.name in timed else file.read_bytes() for file in sorted(files)}


def same_bytes(folder: Path, whole: Path, outs: list[str] | None = None) -> None:
    """Fail, naming a file, unless both hold the same outputs."""
    ours, theirs = contents(folder, outs), contents(whole, outs)
    differs = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    assert not differs, f"other bytes than those of an uninterrupted run: {', '.join(differs[:3])}"


@dataclass
class Done:
    """How a process ended; `cpu` is the kernel's processor time in seconds."""

    code: int
    text: str
    cpu: float

    def one_line(self, notebook: str) -> str:
        """The one line in which a stage says why it ended; fails where it ended well or says more, or less."""
        assert self.code != 0, "exit code 0"
        assert "Traceback (most recent call last)" not in self.text, f"a traceback: …{self.text[-600:]}"
        lines = [line for line in self.text.splitlines() if line.startswith(f"{notebook}: ")]
        assert len(lines) == 1, f"{len(lines)} lines say why: …{self.text[-600:]}"
        return lines[0]


def run_stage(
    folder: Path,
    stage: Stage,
    at: float | None = None,
    act: Callable[[psutil.Process, psutil.Process], None] = lambda runner, kernel: None,
    timeout: float = 900,
    **settings: str,
) -> Done:
    """Run a stage; once its kernel has used `at` seconds of processor time, `act` on the runner and the kernel."""
    env = environment(folder) | settings
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(FAULTS)])
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        runner = psutil.Popen(
            stage.command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        end, kernel, cpu = time.monotonic() + timeout, None, 0.0
        try:
            while runner.poll() is None:
                assert time.monotonic() < end, f"{stage} did not end within {timeout:g} seconds"
                time.sleep(0.1)
                kernel = kernel or kernel_of(runner)
                cpu = max(cpu, processor_time(kernel))
                if at is not None and kernel and cpu >= at:
                    at = None
                    act(runner, kernel)
        finally:
            end_all([process for process in (runner, kernel) if process])
        output.seek(0)
        return Done(runner.returncode, output.read(), cpu)


def kernel_of(runner: psutil.Process) -> psutil.Process | None:
    """The notebook's kernel below a process; it has a session of its own."""
    try:
        for child in runner.children(recursive=True):
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                return child
    except psutil.Error:
        pass
    return None


def processor_time(process: psutil.Process | None) -> float:
    try:
        return sum(process.cpu_times()[:4]) if process else 0.0
    except psutil.Error:
        return 0.0


def end_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
            process.wait(20)
        except psutil.Error:
            pass


def kill(_: psutil.Process, kernel: psutil.Process) -> None:
    kernel.send_signal(signal.SIGKILL)


@contextmanager
def own_disk(folder: Path) -> Iterator[Callable[[int], None] | None]:
    """A file system of its own in a new folder; gives what leaves so many bytes free on it. None where this user may
    not mount one."""
    folder.mkdir(parents=True)

    def mount(options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", options, "attack", str(folder)]
        return subprocess.run(command, capture_output=True).returncode

    def leave(free: int) -> None:
        disk = os.statvfs(folder)
        size = (disk.f_blocks - disk.f_bfree) * disk.f_frsize + free
        assert mount(f"remount,size={size}") == 0

    if not shutil.which("mount") or mount("size=1g") != 0:
        yield None
        return
    try:
        yield leave
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
