"""What the code imports is what pyproject.toml says it needs, written down once."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

from rlaifv import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normalized(re.match(r"[\w.-]+", requirement).group()) for requirement in requirements}


def imported_packages(folder: str) -> set[str]:
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {name.split(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"rlaifv"}


def test_every_package_that_the_module_imports_is_declared():
    homes = packages_distributions()
    optional = {"bitsandbytes", "deepspeed"}  # only where a parameter asks for them, with a line that says so
    needed = {normalized(homes[name][0]) for name in imported_packages("rlaifv") - optional if name in homes}
    ipython = {"ipython"}  # comes with jupyterlab, without which no notebook could show anything
    assert needed - declared(PROJECT["dependencies"]) - ipython == set()


def test_dependencies_are_listed_once_and_the_exact_versions_cover_them():
    text = (ROOT / "environment.yml").read_text()
    assert "-e .[dev]" in text and "torch" not in text
    pinned = {normalized(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    assert declared([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]) <= pinned


def test_make_clean_spares_what_was_computed_and_asks_before_it_does_not(tmp_path):
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    made, yours = ("data/iterations/1", "runs/timings", "scratch/train@1-00"), ("data/images", "data/checkpoints")
    for folder in (".venv", *made, *yours):
        (tmp_path / folder).mkdir(parents=True)

    def clean(*arguments: str, answer: str = "") -> int:
        command = ["make", "clean", *arguments]
        return subprocess.run(command, cwd=tmp_path, input=answer, text=True, capture_output=True).returncode

    assert clean() == 0 and not (tmp_path / ".venv").exists()
    assert clean("ALL=1", answer="no\n") != 0
    assert all((tmp_path / folder).is_dir() for folder in (*made, *yours))
    assert clean("ALL=1", answer="yes\n") == 0
    assert not any((tmp_path / folder).exists() for folder in made) and all((tmp_path / f).is_dir() for f in yours)
