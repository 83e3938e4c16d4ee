"""A copy of the repository in an empty folder, for tests that run stages: they write to data/ of their own copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from rlaifv import ROOT

PARTS = ("rlaifv", "notebooks", "models", "params", "params.yaml", "dvc.yaml", ".dvcignore", ".gitignore")


def copy_repository(folder: Path, change=lambda content: None) -> Path:
    """Copy what a run needs; `change` edits the parameters in place before they are written."""
    folder.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy(source, folder / part)
    edit_params(folder, change)
    return folder


def dvc_repository(folder: Path) -> Path:
    """Make a copy a repository of git and DVC."""
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    run(folder, "dvc", "init", "-q")
    run(folder, "dvc", "config", "core.analytics", "false")
    run(folder, "dvc", "config", "core.check_update", "false")
    return folder


def edit_params(folder: Path, change) -> None:
    """Let `change` edit the copy's parameters in place."""
    yaml = YAML()
    content = yaml.load(folder / "params.yaml")
    change(content)
    yaml.dump(content, folder / "params.yaml")


def environment(folder: Path) -> dict[str, str]:
    """Python finds the copy before the installed package."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": str(folder), "PATH": path, "OMP_NUM_THREADS": "1"}


def run(folder: Path, *command: str, timeout: float = 300) -> str:
    """Run a command in the copy; returns what it printed and fails with it."""
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout
