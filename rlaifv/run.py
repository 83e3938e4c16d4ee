"""Run one stage notebook with papermill, as dvc.yaml does.

    python -m rlaifv.run 20_generate iteration=1 prev=0 params_file=params.yaml

The parameter file is checked before a kernel starts. What the notebook prints is logged as it comes; when it fails,
one line says why and where the executed notebook lies, with the whole traceback.
"""

import logging
import os
import sys

from rlaifv import ROOT
from rlaifv.params import ParamsError, load_params
from rlaifv.stage import RUNS


def main(arguments: list[str]) -> int:
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
        load_params(parameters.get("params_file", "params.yaml"))
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 1
    return execute(notebook, parameters)


def execute(notebook, parameters: dict[str, str]) -> int:
    """Run the notebook; its executed copy goes to runs/[iteration/]NAME.ipynb."""
    # jsonschema would build a grammar of IRIs, 2 seconds of every stage; without that module it leaves them unchecked
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from papermill.exceptions import PapermillExecutionError

    executed = RUNS / parameters.get("iteration", "") / notebook.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    logging.getLogger("papermill.translators").setLevel(logging.ERROR)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    # the kernel takes the package from where this one is: in a copy of the repository (`dvc exp run --temp`), the copy
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
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
        print(f"{notebook.stem}: {error.ename}: {error.evalue}", file=sys.stderr)
        print(f"the traceback is in {executed.relative_to(ROOT)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
