"""The attack itself: it fails when one attack is not handled, whatever becomes of the process that tried it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from guards import GUARDS
from harness import Case, print_table, run_cases

KIND = "DVC"


def attacked(tmp_path: Path, *works, seconds: float = 60) -> list[tuple[str, str, str]]:
    cases = [Case(f"case {n}", (KIND,), work, needs_whole=False, seconds=seconds) for n, work in enumerate(works)]
    return run_cases(cases, tmp_path, seed=0, at_once=2)


def handled(attempts, whole):
    with attempts.attack(KIND, "handled"):
        pass


def not_handled(attempts, whole):
    with attempts.attack(KIND, "not handled"):
        raise AssertionError("exit code 0")


def dies(attempts, whole):
    handled(attempts, whole)
    os.kill(os.getpid(), 9)


def hangs(attempts, whole):
    time.sleep(60)


def test_where_all_is_handled_the_exit_code_is_0(tmp_path, capsys):
    assert print_table(attacked(tmp_path, handled, handled)) == 0
    assert "| DVC                          |     2 |            2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("work", "named"),
    [
        (not_handled, "NOT HANDLED DVC: not handled: AssertionError"),
        (dies, "NOT HANDLED DVC: case 1: ended with exit code -9"),
        (hangs, "NOT HANDLED DVC: case 1: ended with exit code -9"),
    ],
)
def test_one_that_is_not_handled_is_named_and_the_exit_code_is_1(tmp_path, capsys, work, named):
    assert print_table(attacked(tmp_path, handled, work, seconds=1)) == 1
    assert named in capsys.readouterr().out


def test_nothing_tried_is_not_handled(capsys):
    assert print_table([]) == 1


def test_the_same_seed_makes_the_same_choices(tmp_path):
    def tell(attempts, whole):
        attempts.note(KIND, str(attempts.random.random()))

    numbers = {attacked(tmp_path / name, tell)[0][1] for name in ("a", "b") if not (tmp_path / name).mkdir()}
    assert len(numbers) == 1


def test_a_guard_is_taken_out_when_its_module_is_imported():
    program = (
        "from guards import GUARDS; GUARDS['checksums'].take_out(); import rlaifv.store as s; print(s._checksum('a'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "unchecked\n", done.stderr
    assert all(module.startswith(("rlaifv.", "papermill")) for guard in GUARDS.values() for module in guard.changes)
