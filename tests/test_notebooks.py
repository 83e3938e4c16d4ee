"""Notebooks are thin and stripped, and the pipeline names the files that it runs through."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from ruamel.yaml import YAML
from traitlets.config import PyFileConfigLoader

from rlaifv import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
EXPERIMENTS = YAML(typ="safe", pure=True).load(ROOT / "experiments" / "dvc.yaml")["stages"]


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
    """The modules that a source imports from rlaifv, as paths below the repository."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlaifv":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {name.replace(".", "/") + ".py" for name in names}
    return {name for name in found if (ROOT / name).is_file()}


def run_through(modules: set[str]) -> set[str]:
    """The modules of the rooms among these and all that they import in turn. The ground (files at the top: rows to and
    from files, values, paths; the store and how it spreads work) and the pictures of executed notebooks change no
    result by themselves."""
    found, todo = set(), {name for name in modules if name != "rlaifv/report/plots.py"}
    while todo:
        name = todo.pop()
        if name.count("/") > 1 and not name.startswith("rlaifv/store/") and name not in found:
            found.add(name)
            todo |= imported((ROOT / name).read_text())
    return found


def working_stages():
    for name, stage in [*stages(), *((name, stage.get("do", stage)) for name, stage in EXPERIMENTS.items())]:
        if not stage.get("frozen"):
            yield pytest.param(name, stage, id=name)


@pytest.mark.parametrize(("name", "stage"), working_stages())
def test_a_stage_depends_on_every_room_that_it_runs_through(name, stage):
    if name == "report":
        pytest.skip("its views fingerprint checkpoints and so import every room; what it shows lies in data/results")
    deps = [ROOT / dep for dep in stage["deps"]]
    needed = run_through(imported(code_of(stage["cmd"].split()[3])))
    assert not {n for n in needed if not any((ROOT / n).is_relative_to(dep) for dep in deps)}


def chains(source: str, name: str) -> set[str]:
    """What is read of the variable `name` (or of `stage.name`): "a.b" for name.a.b, "" for the whole of it."""
    found, inner = set(), set()
    for node in ast.walk(ast.parse(source)):
        parts, at = [], node
        while isinstance(at, ast.Attribute):
            inner.add(id(at.value))
            parts.insert(0, at.attr)
            at = at.value
        loaded = isinstance(at, ast.Name) and isinstance(at.ctx, ast.Load) and id(node) not in inner
        if loaded and [at.id, *parts][:2] == ["stage", name]:
            found.add(".".join(parts[1:]))
        elif loaded and at.id == name:
            found.add(".".join(parts))
    return found


@pytest.mark.parametrize(("name", "stage"), working_stages())
def test_a_stage_declares_every_parameter_that_its_notebook_reads(name, stage):
    source = code_of(stage["cmd"].split()[3])
    source = re.sub(r"^(\w+, )*params(, \w+)* = .*$", "", source, flags=re.MULTILINE)  # `params, paths = stage.…`
    declared = stage.get("params", [])
    reads = chains(source, "params") - {""}  # handed on whole: `Stage.params` itself refuses what is not declared
    assert not {read for read in reads if not any(f"{read}.".startswith(f"{d}.") for d in declared)}


def test_nothing_depends_on_an_executed_notebook():
    assert not [d for _, stage in stages() for d in stage["deps"] if d.startswith("runs/")]


def test_the_next_iteration_waits_for_the_selection_alone_and_an_edit_in_a_benchmark_reruns_that_stage_alone():
    stage = {name: stage.get("do", stage) for name, stage in STAGES.items()}
    needed, found = {"data/iterations/${item.prev}/policy"}, set()
    makers = {out: name for name, s in stage.items() for o in s["outs"] for out in ([o] if isinstance(o, str) else o)}
    makers = {out.replace("${key}", "${item.prev}"): name for out, name in makers.items()}
    while needed:
        name = makers.get(needed.pop())
        if name and name not in found:
            found.add(name)
            needed |= {dep.replace("${key}", "${item.prev}") for dep in stage[name]["deps"]}
    assert {"select", "train", "generate"} <= found and not found & {"test", "benchmarks", "report", "exam"}
    assert {n for n in stage if "rlaifv/benchmarks" in stage[n]["deps"]} == {"benchmarks", "benchmarks_base", "report"}


def test_dvc_sees_every_iteration_of_the_profile():
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True
    )
    if "not inside of a DVC repository" in result.stderr:
        pytest.skip("the tests run outside a DVC checkout")
    names = result.stdout.split()
    iterations = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")["iterations"]
    assert {f"train@{name}" for name in iterations} <= set(names)


def test_every_notebook_is_valid_json_without_absolute_paths():
    for path in NOTEBOOKS:
        assert str(ROOT) not in json.dumps(json.loads(path.read_text()))


@pytest.fixture
def lab(tmp_path):
    """JupyterLab's manager of files with the repository's configuration, over a copy of its notebooks."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    config = PyFileConfigLoader("jupyter_server_config.py", str(tmp_path / "notebooks")).load_config()
    return LargeFileManager(config=config, root_dir=str(tmp_path))


def run_and_save(lab, path: str, change: str = "") -> bytes:
    """What the file is after its cells have run in JupyterLab and it was saved."""
    model = lab.get(path)
    notebook = model["content"]
    notebook["metadata"]["language_info"] = {"name": "python", "version": "3.99"}
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"]["execution"] = {"iopub.status.busy": "2026-11-27T00:00:00Z"}
        if cell["cell_type"] == "code":
            cell["execution_count"] = number
            cell["outputs"] = [nbformat.v4.new_output("stream", text="hello")]
            cell["source"] += change
    lab.save({**model, "content": notebook}, path)
    return Path(lab.root_dir, path).read_bytes()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_running_and_saving_a_stage_notebook_in_lab_leaves_its_bytes(lab, path):
    assert run_and_save(lab, f"notebooks/{path.name}") == path.read_bytes()


def test_what_somebody_writes_into_a_stage_notebook_is_kept_and_outputs_of_explore_are_too(lab):
    changed = nbformat.reads(run_and_save(lab, "notebooks/50_pairs.ipynb", "\n# mine").decode(), 4)
    assert all(cell.source.endswith("# mine") for cell in changed.cells if cell.cell_type == "code")
    assert b"hello" in run_and_save(lab, "notebooks/explore/chat.ipynb")
