"""The recipes of slurm/ in a real queue of two nodes (`make slurm-here` starts one on this machine). Takes minutes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from training_runs import digests, folder

from rlaifv import ROOT
from rlaifv.params import read_content
from rlaifv.profiles.rehearse import copy_repository, surroundings

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
__all__ = ["folder"]  # a fixture: pytest finds it by its name in this module
CHUNKS = 10
REPRO = [sys.executable, "-m", "dvc", "repro", "generate@1"]


def queue() -> str:
    """The states of the queue's nodes; "" where there is none."""
    if not shutil.which("sinfo"):
        return ""
    return subprocess.run(["sinfo", "-N", "-h", "-o", "%t"], capture_output=True, text=True).stdout


pytestmark = pytest.mark.skipif(queue().split() != ["idle"] * 2, reason="no idle Slurm queue here: make slurm-here")


@pytest.fixture
def repository(tmp_path):
    """A copy of the repository with few instructions; `repository(**cluster)` sets how its work is spread."""

    def make(name: str, **cluster) -> Path:
        folder = tmp_path / name
        copy_repository(folder)
        shutil.copytree(ROOT / "slurm", folder / "slurm")
        (folder / ".venv").symlink_to(sys.prefix)
        content = read_content(ROOT / "params" / "default.yaml")
        content["world"] |= {"train": 40, "dev": 8, "test": 8}
        content["prepare"]["per_iteration"] = 40
        content["iterations"] = {"1": {"prev": "0"}}
        content["generate"] |= {"samples": 4, "batch_size": 40 // CHUNKS}
        content["cluster"] |= cluster
        YAML().dump(content, folder / "params.yaml")
        return folder

    return make


def sbatch(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["sbatch", *arguments], cwd=folder, capture_output=True, text=True, timeout=540)


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("slurm-*.log")))[-6000:]


def candidates(folder: Path) -> bytes:
    return (folder / "data/iterations/1/candidates/candidates.jsonl").read_bytes()


def test_an_allocation_of_two_nodes_is_cancelled_and_goes_on_to_the_bytes_of_one_process(repository):
    alone = repository("alone")
    subprocess.run(REPRO, cwd=alone, check=True, capture_output=True, env=surroundings(alone))
    folder = repository("spread", engine="ray")
    job = sbatch(folder, "--parsable", "--nodes=2", "slurm/repro.sbatch", "generate@1").stdout.strip()
    chunks = folder / "scratch"
    until = time.monotonic() + 300
    while len(list(chunks.glob("generate@1-*/0*.jsonl"))) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    subprocess.run(["scancel", job], check=True)
    while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip():
        time.sleep(1)
    done = list(chunks.glob("generate@1-*/0*.jsonl"))
    assert 2 <= len(done) < CHUNKS, logs(folder)
    ended = sbatch(folder, "--wait", "--nodes=2", "slurm/repro.sbatch", "generate@1")
    assert ended.returncode == 0, logs(folder)
    assert "chunks are done already" in logs(folder)
    assert candidates(folder) == candidates(alone)


def test_a_stage_that_is_named_is_a_job_of_the_queue_and_its_failure_is_the_runs(repository):
    folder = repository("staged", submit={"generate": "sbatch --wait slurm/stage.sbatch"})
    done = subprocess.run(REPRO, cwd=folder, capture_output=True, text=True, env=surroundings(folder))
    assert done.returncode == 0 and "Submitted batch job" in done.stdout, done.stdout + done.stderr + logs(folder)
    assert len(list(folder.glob("slurm-rlaifv-stage-*.log"))) == 1 and candidates(folder)
    command = [sys.executable, "-m", "rlaifv.run", "20_generate", "iteration=7", "prev=0"]
    failed = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=surroundings(folder))
    assert failed.returncode == 1 and "the job ended with exit code 1" in failed.stderr


TRAIN = """
import dataclasses, sys
from pathlib import Path
from training_runs import PARAMS, run
run(Path(sys.argv[1]), sys.argv[2], dataclasses.replace(PARAMS, processes=2, machines=int(sys.argv[3])))
"""


def test_training_on_the_two_nodes_of_an_allocation_is_that_of_one_machine(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folder / "job.py").write_text(TRAIN)
    command = f"{sys.executable} job.py {folder}"
    subprocess.run([*command.split(), "one", "1"], cwd=folder, check=True, capture_output=True)
    job = sbatch(folder, "--wait", "--nodes=2", "--ntasks-per-node=1", f"--wrap={command} two 2")
    assert job.returncode == 0, logs(folder)
    assert digests(folder / "two" / "out") == digests(folder / "one" / "out")
