"""The cheap attacks are ordinary tests, which `make test` runs as well: here their results go into the table."""

from functools import partial
from pathlib import Path

import pytest
import transformers  # noqa: F401  once, before the cases are forked: each would take seconds for it
from harness import Attempts, Case

import rlaifv.vlm.loading  # noqa: F401  likewise
from rlaifv import ROOT


class Recorder:
    """Notes every test as an attack: a pytest plugin."""

    def __init__(self, attempts: Attempts, kind: str) -> None:
        self.attempts, self.kind = attempts, kind

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed or (report.when == "call" and report.passed):
            problem = report.longreprtext.strip().splitlines()[-1] if report.failed else ""
            self.attempts.note(self.kind, report.nodeid, problem)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.attempts.note(self.kind, report.nodeid, report.longreprtext.strip().splitlines()[-1])


def run_tests(attempts: Attempts, _: Path, kind: str, files: tuple[str, ...], chosen: str) -> None:
    options = ["-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    options += [f"--basetemp={attempts.folder}", *(["-k", chosen] if chosen else [])]
    pytest.main([*options, *(str(ROOT / file) for file in files)], plugins=[Recorder(attempts, kind)])


def tests(kind: str, *files: str, chosen: str = "") -> Case:
    """The tests of some files as attacks of one kind; `chosen` as in pytest's `-k`."""
    name = " and ".join(files) + (f" ({chosen})" if chosen else "")
    return Case(name, (kind,), partial(run_tests, kind=kind, files=files, chosen=chosen), needs_whole=False)


TIDY = "tidies_up or again_at_once or nothing_in_out or fails_all"
ORDINARY = [
    tests("kill inside train's clean-up", "tests/training/test_broken_runs.py", chosen=TIDY),
    tests("corrupt training state", "tests/training/test_broken_runs.py", chosen=f"not ({TIDY})"),
    tests("low memory", "tests/test_run.py", chosen="memory or killed or written or full or stopped"),
    tests(
        "not a number",
        *("tests/steps/test_feedback.py", "tests/inference/test_sampling.py", "tests/evaluation/test_hallucination.py"),
        chosen="nan or no_number",
    ),
    tests("parameter files", "tests/test_params.py", chosen="refused or one_line or spelling or hint or names"),
    tests("prepare: files, rows, images", "tests/steps/test_prepare.py", "tests/vlm/test_images.py"),
    tests("broken model folders", "tests/vlm/test_weights.py", "tests/vlm/test_broken_folders.py"),
    tests("served-labeler habits", "tests/inference/test_server.py"),
    tests("corrupt scratch and records", "tests/test_store.py", "tests/test_records.py"),
    tests(
        "special tokens and odd text",
        "tests/vlm/test_chat_format.py",
        "tests/report",
        chosen="(special or text or script or name or math or token or page) and not book",
    ),
    tests("chat, export", "tests/test_chat.py", chosen="line or image or question or model"),
    tests("chat, export", "tests/test_export.py", chosen="card or exported or clear or beside or overwritten"),
]
