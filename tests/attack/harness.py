"""What a case of the attack is, and how cases are run: each in a process of its own, some at a time."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

TABLE = (
    "random kills",
    "kill inside train's clean-up",
    "disk full",
    "low memory",
    "not a number",
    "parameter files",
    "prepare: files, rows, images",
    "special tokens and odd text",
    "broken model folders",
    "served-labeler habits",
    "corrupt scratch and records",
    "corrupt training state",
    "chat, export",
    "DVC",
)
"""The kinds of attack, in the order of the table."""


class Attempts:
    """Where a case says what it tried: one line of JSON each, so that nothing is lost when its process dies."""

    def __init__(self, file: Path, seed: str, folder: Path) -> None:
        self.file, self.folder = file, folder
        self.random = random.Random(seed)

    def note(self, kind: str, name: str, problem: str = "") -> None:
        assert kind in TABLE, kind
        with self.file.open("a") as stream:
            stream.write(json.dumps([kind, name, problem]) + "\n")

    @contextmanager
    def attack(self, kind: str, name: str) -> Iterator[None]:
        """One attack: handled when nothing is raised."""
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.note(kind, name, f"{type(error).__name__} in line {where.lineno} of {where.name}: {error}")
        else:
            self.note(kind, name)


@dataclass(frozen=True)
class Case:
    """A piece of the attack, of one or several kinds. `work` gets a folder to make and the whole run in `whole`; with
    `needs_whole` it begins when that is there."""

    name: str
    kinds: tuple[str, ...]
    work: Callable[[Attempts, Path], None]
    needs_whole: bool = True
    seconds: float = 1800


def run_cases(cases: Sequence[Case], work: Path, seed: int, at_once: int) -> list[tuple[str, str, str]]:
    """Run the cases, the first first, and before them the whole run that some are compared with, unless it is there;
    returns (kind, name, problem) of every attack."""
    from siege import WHOLE

    whole, context = work / "whole", multiprocessing.get_context("fork")
    there = whole.is_dir()
    waiting = [*cases] if there or not any(case.needs_whole for case in cases) else [WHOLE, *cases]
    running: dict[multiprocessing.Process, tuple[Case, Path, float]] = {}
    found: list[tuple[str, str, str]] = []
    try:
        while waiting or running:
            while len(running) < at_once and (case := next((c for c in waiting if there or not c.needs_whole), None)):
                waiting.remove(case)
                file = work / f"{case.name.replace('/', '-').replace(' ', '-')}.jsonl"
                process = context.Process(target=run_one, args=(case, file, f"{seed}/{case.name}", work, whole))
                process.start()
                running[process] = (case, file, time.monotonic())
            time.sleep(0.1)
            for process, (case, file, began) in list(running.items()):
                if process.is_alive() and time.monotonic() - began > case.seconds:
                    end_family(process)
                if process.is_alive():
                    continue
                process.join()
                del running[process]
                told = [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []
                if process.exitcode != 0:
                    log = file.with_suffix(".log")
                    told.append((case.kinds[0], case.name, f"ended with exit code {process.exitcode}: see {log}"))
                bad, minutes = sum(bool(problem) for *_, problem in told), (time.monotonic() - began) / 60
                print(f"{case.name}: {len(told)} tried, {bad} not handled, {minutes:.1f} minutes", flush=True)
                found += told
                if case is WHOLE:
                    there = process.exitcode == 0
                    waiting = [case for case in waiting if there or not case.needs_whole]
    finally:  # interrupted: nothing goes on, and no file system stays mounted
        for process in running:
            end_family(process)
        if shutil.which("umount"):
            for line in Path("/proc/mounts").read_text().splitlines():
                if (place := Path(line.split()[1])).is_relative_to(work.resolve()):
                    subprocess.run(["umount", "--lazy", str(place)])
    return found


def end_family(process: multiprocessing.Process) -> None:
    """Kill a case's process and all that it has started."""
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    process.kill()


def run_one(case: Case, file: Path, seed: str, work: Path, whole: Path) -> None:
    """In the case's own process: what it prints goes to a log beside its attempts."""
    os.setsid()
    log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    case.work(Attempts(file, seed, work / file.stem), whole)


def print_table(found: Sequence[tuple[str, str, str]]) -> int:
    """The table, then every attack that was not handled; returns the exit code."""
    width = max(map(len, TABLE))
    print(f"\n| {'attack':{width}} | tried | handled well |\n|{'-' * (width + 2)}|------:|-------------:|")
    for kind in TABLE:
        if problems := [problem for of, _, problem in found if of == kind]:
            print(f"| {kind:{width}} | {len(problems):5} | {problems.count(''):12} |")
    wrong = [entry for entry in found if entry[2]]
    total = f"{len(found) - len(wrong)} of {len(found)} attacks handled well"
    print(f"\n{total}" + "".join(f"\nNOT HANDLED {kind}: {name}: {problem}" for kind, name, problem in wrong))
    sys.stdout.flush()
    return 1 if wrong or not found else 0
