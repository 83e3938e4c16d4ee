"""Notebooks are thin and stripped, and the pipeline names files that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from ruamel.yaml import YAML

from rlaifv import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]


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
