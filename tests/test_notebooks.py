"""Notebooks are thin and stripped, and the pipeline names the files that it runs through."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from ruamel.yaml import YAML

from rlaifv import ROOT
from rlaifv.stage import ANSWERING
from rlaifv.training.job import SOURCES

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
EXPERIMENTS = YAML(typ="safe", pure=True).load(ROOT / "experiments" / "dvc.yaml")["stages"]

UNCONCERNED = {  # a change of these changes no result, or a result only through what a stage depends on anyway
    "benchmarks/cli.py",  # the benchmarks as commands
    "params.py",  # values: the stage's `params`
    "plots.py",  # the pictures in executed notebooks
    "records.py",  # rows to and from files
    "report.py",  # as select uses it: a round's result files, read back
    "stage.py",  # paths, the clock, and the loading of models by vlm.py and served.py
}


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stripped_and_holds_no_function_or_class(path):
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None
        assert not re.search(r"^\s*(def|class|async def)\s", cell.source, re.MULTILINE), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_one_parameters_cell_before_any_other_code(path):
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in code_cells(path)]
    assert tagged[0] and sum(tagged) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_fits_on_a_few_screens(path):
    assert sum(len(cell.source.splitlines()) for cell in code_cells(path)) <= 100


def stages():
    for name, stage in STAGES.items():
        yield name, stage.get("do", stage)


@pytest.mark.parametrize(("name", "stage"), stages(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_stage_runs_its_own_notebook_and_depends_on_files_of_the_repository(name, stage):
    notebook = re.match(r"python -m rlaifv\.run (\S+)", stage["cmd"]).group(1)
    assert f"notebooks/{notebook}.ipynb" in stage["deps"]
    own = [d for d in stage["deps"] if not d.startswith("data/") and "$" not in d]
    assert all((ROOT / d).exists() for d in own), own


def code_of(notebook: str) -> str:
    return "\n".join(cell.source for cell in code_cells(ROOT / "notebooks" / f"{notebook}.ipynb"))


def imported(source: str) -> set[str]:
    """The modules that a source imports from rlaifv, as paths below rlaifv/."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlaifv":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {"/".join(name.split(".")[1:]) + ".py" for name in names}
    return {name for name in found if (ROOT / "rlaifv" / name).is_file()}


def run_through(modules: set[str]) -> set[str]:
    """The modules and all that they import in turn, without those that change no result."""
    found, todo = set(), set(modules)
    while todo:
        name = todo.pop()
        if name not in found | UNCONCERNED:
            found.add(name)
            todo |= imported((ROOT / "rlaifv" / name).read_text())
    return found


def working_stages():
    """Without the frozen stage, and without the report: its modules import the driver of the experiments, and with it
    everything, for a fingerprint alone."""
    for name, stage in [*stages(), *EXPERIMENTS.items()]:
        if not stage.get("frozen") and name != "report":
            yield pytest.param(stage, id=name)


@pytest.mark.parametrize("stage", working_stages())
def test_a_stage_depends_on_every_module_that_it_runs_through(stage):
    deps = [ROOT / dep for dep in stage["deps"]]
    needed = run_through(imported(code_of(stage["cmd"].split()[3])))
    assert not {n for n in needed if not any((ROOT / "rlaifv" / n).is_relative_to(dep) for dep in deps)}


KEYED = [path.stem for path in NOTEBOOKS if "stage.key(" in path.read_text()]


@pytest.mark.parametrize("notebook", KEYED)
def test_the_key_of_unfinished_work_covers_every_module_that_the_work_runs_through(notebook):
    named = {n.value for n in ast.walk(ast.parse(code_of(notebook))) if isinstance(n, ast.Constant)}
    modules = {name for name in named if str(name).endswith(".py")} | set(ANSWERING)
    assert run_through(modules) <= modules
    assert any(name in modules for name in imported(code_of(notebook))), "the module whose work it is"


def test_a_training_run_is_known_by_every_module_that_it_goes_through():
    assert run_through({"train.py"}) == set(SOURCES)


def test_nothing_depends_on_an_executed_notebook():
    assert not [d for _, stage in stages() for d in stage["deps"] if d.startswith("runs/")]


def test_dvc_sees_every_round_of_the_profile():
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True
    )
    if "not inside of a DVC repository" in result.stderr:
        pytest.skip("the tests run outside a DVC checkout")
    names = result.stdout.split()
    rounds = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")["iterations"]
    assert {f"train@{name}" for name in rounds} <= set(names)


def test_dependencies_are_listed_once():
    text = (ROOT / "environment.yml").read_text()
    assert "-e .[dev]" in text
    assert "torch" not in text


def test_every_notebook_is_valid_json_without_absolute_paths():
    for path in NOTEBOOKS:
        assert str(ROOT) not in json.dumps(json.loads(path.read_text()))
