"""The attack on the whole pipeline: kills, full disks, low memory, odd parameters, rows, images, texts, model folders,
servers, corrupt files; real processes of a small profile, 15 minutes at most on two cores.

    make attack                            # the table; exit code 1 when one attack is not handled, naming it
    make attack SEED=7                     # other moments, other places
    make attack ARGS="--only kills"        # the cases with that in their kind or name; --list names them
    make attack ARGS=--without-guards      # takes guards out, one at a time: each time the attack must notice
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers"), str(HERE.parents[1])]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from guards import GUARDS  # noqa: E402
from harness import print_table, run_cases  # noqa: E402


def chosen(only: str | None) -> list:
    from cases import CASES

    return [case for case in CASES if not only or only in case.name or any(only in kind for kind in case.kinds)]


def without_each_guard(seed: int, work: Path) -> int:
    """Take one guard out at a time and run the cases that must notice; exit code 1 when they do not."""
    print("| guard taken out | what it keeps | noticed |\n|---|---|---|")
    missed = 0
    for name, guard in GUARDS.items():
        command = [sys.executable, str(HERE), "--seed", str(seed), "--without", name, "--only", guard.noticed_by]
        command += ["--work", str(work / name)] + (["--keep"] if (work / "whole").is_dir() else [])
        done = subprocess.run(command, capture_output=True, text=True)
        noticed = done.returncode == 1 and "NOT HANDLED" in done.stdout
        missed += not noticed
        print(f"| {name} | {guard.keeps} | {'yes' if noticed else 'NO'} |", flush=True)
        if not noticed:
            print(done.stdout + done.stderr)
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of every moment and place that is chosen by chance")
    parser.add_argument("--only", metavar="TEXT", help="cases with this in their kind or name")
    parser.add_argument("--without", metavar="GUARD", choices=sorted(GUARDS), help="take this guard out first")
    parser.add_argument("--without-guards", action="store_true", help="each guard of guards.py in turn")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="cases at a time")
    parser.add_argument("--work", type=Path, help="an empty or new folder, which stays; a whole run in it is used")
    parser.add_argument("--list", action="store_true", help="name the cases and leave")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="attack-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        if options.without_guards:
            return without_each_guard(options.seed, work)
        if options.without:
            os.environ["ATTACK_WITHOUT"] = options.without
            GUARDS[options.without].take_out()
        cases = chosen(options.only)
        if options.list or not cases:
            print("\n".join(f"{case.name} ({', '.join(case.kinds)})" for case in cases) or "no such case")
            return 0 if cases else 2
        found = run_cases(cases, work, options.seed, options.at_once)
        code = print_table(found)
        if code and not options.work:
            print(f"what they left: {work}")
            options.work = work
        return code
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
