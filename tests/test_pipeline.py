"""The pipeline as a user meets it: killed in the middle and continued it gives the same bytes, and what changes what a
stage would compute makes exactly the stages run again that it concerns."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from checkout import copy_repository, dvc_repository, edit_params, environment, run
from ruamel.yaml import YAML


def small(content) -> None:
    content["world"].update(train=24, dev=4, test=4)
    content["prepare"].update(per_iteration=12)
    content["generate"].update(samples=4, batch_size=2)
    content["divide"].update(batch_size=8)
    content["feedback"].update(batch_size=2)
    content["report"].update(gallery=1)


def kill_when(folder: Path, pattern: str, timeout: float = 240) -> None:
    """Start `dvc repro feedback@1` and kill -9 it and its children when a scratch file of that pattern appears."""
    command = [sys.executable, "-m", "dvc", "repro", "feedback@1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = psutil.Popen(command, cwd=folder, env=environment(folder), **quiet)
    end = time.monotonic() + timeout
    while not list((folder / "scratch").glob(pattern)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert list((folder / "scratch").glob(pattern)), f"no {pattern} before the run ended"
    for one in [process, *process.children(recursive=True)]:  # the kernel has a session of its own and would go on
        one.kill()
    process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "data").rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = dvc_repository(copy_repository(tmp_path_factory.mktemp("pipeline") / "whole", small))
    run(folder, "dvc", "repro", "feedback@1")
    return folder


def as_before(whole: Path, folder: Path, *stages: str) -> Path:
    """A copy of a run in which these stages, and what follows them, have not run."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("scratch"))
    shutil.rmtree(folder / ".dvc/cache/runs")  # from which DVC would take what has run
    yaml = YAML()
    lock = yaml.load(folder / "dvc.lock")
    for stage in stages:
        for out in lock["stages"].pop(stage)["outs"]:
            path = folder / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    yaml.dump(lock, folder / "dvc.lock")
    return folder


def test_a_dvc_run_killed_in_generate_and_in_feedback_continues_to_the_same_bytes(whole, tmp_path):
    killed = as_before(whole, tmp_path / "killed", "generate@1", "divide@1", "feedback@1")
    assert len(contents(killed)) < len(contents(whole))
    kill_when(killed, "generate@1-*/*.jsonl")
    kill_when(killed, "feedback@1-*/*.jsonl")
    run(killed, "dvc", "repro", "feedback@1")
    assert contents(killed) == contents(whole)
    assert "data/iterations/1/judgements/judgements.jsonl" in contents(whole)
    again = run(whole, "dvc", "repro", "feedback@1")
    assert "Running stage" not in again, "nothing has changed"


@pytest.mark.parametrize(
    ("file", "concerned"),
    [
        ("rlaifv/vlm/images.py", {"prepare", "models", "generate@1", "divide@1", "feedback@1"}),
        ("rlaifv/inference/yes_no.py", {"models", "generate@1", "divide@1", "feedback@1"}),
        ("rlaifv/steps/divide.py", {"divide@1"}),
    ],
)
def test_a_changed_file_makes_the_stages_run_again_that_use_its_room(whole, file, concerned):
    path = whole / file
    before = path.read_text()
    path.write_text(before + "\n# another line\n")
    try:
        status = json.loads(run(whole, "dvc", "status", "--json", "--with-deps", "feedback@1"))
    finally:
        path.write_text(before)
    changed = {
        name: parts["changed deps"] for name, stage in status.items() for parts in stage if "changed deps" in parts
    }
    assert {name for name, deps in changed.items() if any(file.startswith(dep) for dep in deps)} == concerned


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("00_walkthrough", {"more_steps": 1}, "loss: 0.693147"),
        ("agreement", {"annotator": "truth", "n_claims": 20, "n_pairs": 4}, "accuracy, of the claims that were asked"),
    ],
)
def test_a_notebook_for_people_runs_on_what_the_pipeline_has_made(whole, tmp_path, name, parameters, said):
    run(whole, "dvc", "repro", "pairs@1")
    arguments = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    notebook, executed = f"notebooks/explore/{name}.ipynb", tmp_path / "executed.ipynb"
    run(whole, "papermill", notebook, str(executed), "--cwd", "notebooks/explore", *arguments)
    assert said in executed.read_text()


def test_another_dtype_of_the_labeler_gives_other_judgements_and_not_the_old_ones(whole):
    judgements = "data/iterations/1/judgements/judgements.jsonl"
    before = contents(whole)
    edit_params(whole, lambda content: content["labeler"].update(dtype="bfloat16"))
    ran = run(whole, "dvc", "repro", "feedback@1")
    assert "feedback@1" in ran and "Running stage 'generate@1'" not in ran
    after = contents(whole)
    assert after[judgements] != before[judgements] and after[judgements].count(b"\n") == before[judgements].count(b"\n")
    assert after["data/iterations/1/claims/claims.jsonl"] == before["data/iterations/1/claims/claims.jsonl"]
