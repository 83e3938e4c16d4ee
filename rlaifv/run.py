"""Run one stage notebook with papermill, as dvc.yaml does.

    python -m rlaifv.run 20_generate iteration=1 prev=0 params_file=params.yaml

The parameter file is checked before a kernel starts. What the notebook prints is logged as it comes; when it fails,
one line says why and where the executed notebook lies, with the whole traceback. So does a kernel that was killed, and
a run that is stopped by Ctrl-C or SIGTERM (a queue's preemption): the same command goes on where it was.
A stage that `cluster.submit` names becomes a job of a queue, which runs `python -m rlaifv.run --here NOTEBOOK …`.
`python -m rlaifv.run --mend` removes what a kill may have cut of DVC's own files, which `make` does first.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rlaifv import ROOT
from rlaifv.fingerprint import definition_of, place_of, stage_definition
from rlaifv.params import Params, ParamsError, load_params
from rlaifv.records import write_atomic
from rlaifv.results import write_result
from rlaifv.stage import RUNS

FULL = re.compile(r"Errno (28|27|122)\b|os error (28|27|122)\b|inline_container", re.IGNORECASE)
"""How Python, safetensors and torch.save (whose message names only a line of its source) say that a disk, a quota or
a limit of a file's size is full."""
LOW = re.compile(
    r"Errno 12\b|not enough memory|(can.t|cannot|unable to) allocate|bad_alloc|start new thread", re.IGNORECASE
)
"""How Python, torch and C++ say that there is no memory without calling it a MemoryError."""
FEEDBACK = ("20_generate", "30_divide", "40_feedback")
"""The notebooks that make preferences; with `pairs.source` somebody else has made them."""
BENCHMARKS = "84_benchmarks"


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if arguments == ["--mend"]:
        mend(ROOT)
        return 0
    here = arguments[:1] == ["--here"]
    arguments = arguments[here:]
    if not arguments or not all("=" in a for a in arguments[1:]):
        print("usage: python -m rlaifv.run NOTEBOOK [name=value ...]", file=sys.stderr)
        return 2
    name, parameters = arguments[0], dict(a.split("=", 1) for a in arguments[1:])
    notebook = ROOT / "notebooks" / f"{name}.ipynb"
    if not notebook.is_file():
        known = ", ".join(sorted(p.stem for p in notebook.parent.glob("*.ipynb")))
        print(f"no notebook {name!r}; there are: {known}", file=sys.stderr)
        return 2
    try:
        params = load_params(parameters.get("params_file", "params.yaml"))
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 1
    stage = name.partition("_")[2]
    stages = {path.stem.partition("_")[2] for path in notebook.parent.glob("*.ipynb")}
    if unknown := params.cluster.submit.keys() - stages:
        print(f"cluster.submit: no stage {min(unknown)!r}; there are: {', '.join(sorted(stages))}", file=sys.stderr)
        return 1
    if reason := nothing_to_do(name, params):
        print(f"{name}: {reason}")
        return leave_out(notebook, parameters, reason)
    if place := place_of(stage, parameters.get("iteration", ""), list(params.iterations)):
        print(place, flush=True)
    command = params.cluster.submit.get(stage)
    return submit(command, arguments) if command and not here else execute(notebook, parameters)


def nothing_to_do(name: str, params: Params) -> str:
    """Why a notebook need not be run with these parameters (its kernel alone would take seconds); "" where it must."""
    if params.pairs.source and name in FEEDBACK:
        return f"nothing to do: the pairs come from pairs.source = {params.pairs.source}"
    if not params.benchmarks and name == BENCHMARKS:
        return "nothing to do: no benchmarks are configured"
    return ""


def submit(command: str, arguments: list[str]) -> int:
    """Give a stage to a queue by a command that waits for its end; returns the exit code."""
    words = [*shlex.split(command), *arguments]
    print(f"submitted: {shlex.join(words)}", flush=True)
    try:
        code = subprocess.run(words, cwd=ROOT).returncode
    except OSError as error:
        print(
            f"cluster.submit: {words[0]} cannot be started ({error.strerror}): is this a submit host?", file=sys.stderr
        )
        return 1
    if code:
        print(f"{arguments[0]}: the job ended with exit code {code}; its log is slurm-*.log", file=sys.stderr)
    return code


def mend(repository: Path) -> None:
    """Remove what a kill has cut of the files that DVC writes in place and refuses to run with (`make` calls this
    first): who reads and writes what, and what has run. What had run, DVC finds in its cache without it."""
    checks = {".dvc/tmp/rwlock": json.loads, "dvc.lock": check_lock, "experiments/dvc.lock": check_lock}
    for name, check in checks.items():
        if is_cut(repository / name, check):
            (repository / name).unlink(missing_ok=True)
            print(f"{name} was cut by a kill and is removed; DVC writes it anew")


def is_cut(file: Path, check: Callable[[str], object]) -> bool:
    """Whether a file is there and `check` raises ValueError for its text; one that is being written is whole a second
    later."""
    for wait in (1.0, 0.0):
        try:
            check(file.read_text())
        except FileNotFoundError:
            return False
        except ValueError:
            time.sleep(wait)
        else:
            return False
    return True


def check_lock(text: str) -> None:
    """Raise ValueError unless this is what a whole dvc.lock holds, by DVC's own rules."""
    from dvc.exceptions import DvcException
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.serialize import parse_yaml
    from dvc.utils.strictyaml import validate

    try:
        validate(parse_yaml(text, "dvc.lock"), COMPILED_LOCKFILE_SCHEMA, path="dvc.lock")
    except DvcException as error:
        raise ValueError(str(error)) from error


def leave_out(notebook: Path, parameters: dict[str, str], reason: str) -> int:
    """In place of what the stage would have written, which DVC wants to see: the reason, and its notebook as it is."""
    iteration = parameters["iteration"]
    stage = definition_of(notebook.stem.partition("_")[2], iteration)
    try:
        for out in stage_definition(stage)["outs"]:
            path = ROOT / out.replace("${key}", iteration)
            if path.suffix == ".ipynb":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)  # DVC may have linked it to its cache
                shutil.copyfile(notebook, path)
                continue
            shutil.rmtree(path, ignore_errors=True)  # what an earlier run left there is no longer so
            if notebook.stem == BENCHMARKS:
                write_result(path.parent, benchmarks={})  # as the notebook does
            else:
                write_atomic(path / "left_out.txt", reason + "\n")
    except OSError as error:
        print(f"{notebook.stem}: {no_room(str(error))}{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def no_room(said: str) -> str:
    """How a message begins whose error says that there is no room to write; "" for other errors."""
    full = "no room to write: free some space and run the same command again, it goes on where it was; "
    return full if FULL.search(said) else ""


class Stopped(BaseException):
    """A signal asks the run to end; its number is the argument."""


def stop(number: int, _frame: object) -> None:
    raise Stopped(number)


def execute(notebook: Path, parameters: dict[str, str]) -> int:
    """Run the notebook; its executed copy goes to runs/[iteration/]NAME.ipynb. Returns the exit code."""
    # jsonschema would build a grammar of IRIs, 2 seconds of every stage; without that module it leaves them unchecked
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    executed = RUNS / parameters.get("iteration", "") / notebook.name
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    logging.getLogger("papermill.translators").setLevel(logging.ERROR)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    # the kernel takes the package from where this one is: in a copy of the repository (`dvc exp run --temp`), the copy
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        executed.parent.mkdir(parents=True, exist_ok=True)
        executed.unlink(missing_ok=True)  # DVC may have linked it to its cache
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(ROOT),
            progress_bar=False,
            log_output=False,
            shutdown_kernel="immediate",  # what a stage writes is whole when its last cell has run
            extra_arguments=["--log-level=40"],  # the kernel's own warnings are not the stage's
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        mute = error.ename == "CellExecutionError"  # the kernel had not even the memory to say why
        low = mute or error.ename.endswith(("MemoryError", "OutOfMemoryError")) or LOW.search(error.evalue)
        memory = f"out of memory: {lower(notebook)}, and run the same command again; " if low else ""
        print(f"{notebook.stem}: {memory}{no_room(error.evalue)}{error.ename}: {error.evalue}", file=sys.stderr)
        print(f"the traceback is in {executed}", file=sys.stderr)
        return 1
    except DeadKernelError:
        print(
            f"{notebook.stem}: the kernel was killed, usually for memory: {lower(notebook)}, and run the same command "
            "again; it goes on where it was",
            file=sys.stderr,
        )
        return 1
    except (OSError, RuntimeError, LookupError) as error:  # of papermill and Jupyter themselves (no such kernel)
        said = " ".join(str(error).split())
        print(f"{notebook.stem}: {no_room(str(error))}{type(error).__name__}: {said} ({executed})", file=sys.stderr)
        return 1
    except Stopped as stopped:
        name = signal.Signals(stopped.args[0]).name
        print(f"{notebook.stem}: stopped by {name}; the same command goes on where it was", file=sys.stderr)
        return 128 + stopped.args[0]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def lower(notebook: Path) -> str:
    """What makes a stage need less memory."""
    stage = notebook.stem.partition("_")[2]
    section = {"test": "evaluate", "exam": "evaluate", "benchmarks": "evaluate"}.get(stage, stage)
    if section == "train":
        return "lower train.micro_batch_size or train.feature_cache_gb"
    if section in ("generate", "divide", "feedback", "evaluate", "self_feedback"):
        return f"lower {section}.batch_size"
    return "give it more"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
