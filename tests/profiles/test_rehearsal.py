"""A profile is rehearsed from hub id to report without its weights; a wrong one stops in one line.

The hub is a server on loopback with look-alikes of the published models. The client reads its settings when it is
imported, so rehearsals are processes of their own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import copy_repository
from hub import Hub, settings_for
from lookalikes import push_models, write_converted, write_repository

from rlaifv import ROOT
from rlaifv.params import load_params

STOPS = """
import json, sys, time
from rlaifv.profiles.rehearsal import main
for arguments in json.loads(sys.argv[1]):
    started = time.process_time()
    try:
        main(arguments)
    except SystemExit as error:
        print(json.dumps([str(error), time.process_time() - started]))
"""
VL = "Qwen/Qwen3-VL-4B-Instruct"


@pytest.fixture
def hub(tmp_path):
    with Hub() as hub:
        push_models(hub, "llava15-7b", tmp_path / "repositories")
        yield hub


def checkout(folder: Path, **profiles: str) -> Path:
    """A copy of the repository with more profiles."""
    copy_repository(folder)
    for part in ("metrics", "experiments"):
        shutil.copytree(ROOT / part, folder / part)
    for name, text in profiles.items():
        (folder / "params" / f"{name}.yaml").write_text(text)
    return folder


def python(folder: Path, hub: Hub, home: Path, *arguments: str, timeout: float, **settings: str):
    environment = settings_for(hub.endpoint, home) | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | settings
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def stopped(folder: Path, hub: Hub, home: Path, *commands: list[str]) -> list[str]:
    """Why each of these rehearsals stops: one line, soon."""
    done = python(folder, hub, home, "-c", STOPS, json.dumps(commands), timeout=240)
    reasons = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(reasons) == len(commands), done.stderr[-2000:]
    assert all(len(reason.splitlines()) == 1 and seconds < 20 for reason, seconds in reasons), reasons
    return [reason for reason, _ in reasons]


def test_a_wrong_profile_stops_at_once_in_one_line(hub, tmp_path):
    thinker = write_repository(tmp_path / "thinker", VL)
    template = thinker / "chat_template.jinja"
    opened = "{% if add_generation_prompt and enable_thinking is not defined %}{{ '<think>\\n' }}{% endif %}"
    template.write_text(template.read_text() + opened)
    hub.push(VL, thinker)
    profile = load_params("params/llava15-7b.yaml")
    policy, reads = profile.policy, profile.divider
    text = (ROOT / "params" / "llava15-7b.yaml").read_text()
    folder = checkout(
        tmp_path / "copy",
        moved=text.replace(policy.revision, "f" * 40),
        blind=text.replace(policy.path, reads.path).replace(policy.revision, reads.revision),
        thinks=text.replace(policy.path, VL).replace(policy.revision, "null").replace("do_pad: true", ""),
    )
    full = ["llava15-7b", "--gpu", "H100", "--gpus", "8", "--disk", "50"]
    moved, blind, thinks, full, unknown = stopped(
        folder, hub, tmp_path / "home", ["moved"], ["blind"], ["thinks"], full, ["nothing"]
    )
    assert moved.endswith(f"the hub has no revision {'f' * 40!r} of it")
    assert "policy Qwen/Qwen2.5-7B-Instruct" in blind and "sees no images" in blind
    assert f"policy {VL} thinks aloud" in thinks and "enable_thinking: false" in thinks
    assert full.startswith("rehearsal: the profile does not fit: ") and "of 50 GB of disk" in full
    assert "no parameter file" in unknown
    assert not hub.downloads("model.safetensors")
    assert not (folder / "scratch").exists(), "nothing was begun"


SLOW = pytest.mark.skipif("REHEARSE" not in os.environ, reason="takes minutes: `make rehearsals` runs every profile")


def rehearse_converted(name: str, hub, folder: Path) -> tuple[Path, str]:
    """Rehearse a profile of converted checkpoints to its end: the copy in which it ran, and what it printed."""
    root = checkout(folder / "copy")
    push_models(hub, name, folder / "more")
    write_converted(name, root)
    done = python(root, hub, folder / "home", "-m", "rlaifv.profiles.rehearsal", name, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "scratch" / "rehearsal" / name, done.stdout


@SLOW
def test_a_converted_model_is_rehearsed_as_policy_and_labeler_to_the_report(hub, tmp_path):
    copy, output = rehearse_converted("rlaifv-12b-self", hub, tmp_path)
    said = output.count("<im_start><im_patch>×64<im_end>")
    assert said == 4, "policy and labeler, by the rehearsal and by the stages generate and feedback"
    assert "64 tokens for an image" in output
    summary = json.loads((copy / "metrics" / "summary.json").read_text())
    assert set(summary["iterations"]) == {"1"} and (copy / "plots" / "report.html").is_file()


@SLOW
def test_llava_rlhf_is_rehearsed_with_fine_tuning_a_reward_model_and_a_step_of_rloo(hub, tmp_path):
    copy, output = rehearse_converted("llava-rlhf-7b", hub, tmp_path)
    assert "rloo is scored by: 576 tokens an image" in output and "1 steps, 4 answers" in output
    assert {"sft", "reward_models", "rloo"} <= {path.name for path in (copy / "data").iterdir()}
    assert (copy / "plots" / "report.html").is_file()


@SLOW
def test_a_rehearsal_goes_from_hub_ids_to_the_report_without_fetching_weights(hub, tmp_path):
    folder = checkout(tmp_path / "copy")
    done = python(folder, hub, tmp_path / "home", "-m", "rlaifv.profiles.rehearsal", "llava15-7b", timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    copy = folder / "scratch" / "rehearsal" / "llava15-7b"
    assert "<image>×576" in done.stdout and "576 tokens for an image of 640 × 480" in done.stdout
    assert "training: 2 of 8 processes" in done.stdout and "data: drawn scenes for train, dev, test" in done.stdout
    summary = json.loads((copy / "metrics" / "summary.json").read_text())
    assert set(summary["iterations"]) == {"1"} and (copy / "plots" / "report.html").is_file()
    assert not hub.downloads("model.safetensors")
    assert not (folder / "data").exists() and not (folder / "runs").exists(), "the user's own are left alone"
