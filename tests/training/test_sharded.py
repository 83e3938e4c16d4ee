"""Weights spread over processes (FSDP2, DeepSpeed ZeRO) or kept in 4 bits train what one process trains, on CPUs here.

accelerate itself shards on GPUs only: `library_quirks.shard_on_cpus` makes it do so over gloo.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llava import save_pairs, save_wide_llava
from training_runs import PARAMS, digests, folder, log_rows, run
from transformers import AutoModelForImageTextToText

from rlaifv import ROOT
from rlaifv.vlm import loading

__all__ = ["folder"]  # a fixture: pytest finds it by its name in this module


@pytest.fixture
def on_cpus(monkeypatch):
    paths = [str(ROOT / "tests" / "helpers" / "killed_run"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def assert_killed_and_resumed_run_equals_one_process(
    folder: Path, name: str, config: Path, monkeypatch, **settings
) -> None:
    """A run in two processes that dies in its second epoch and is called again, against one process."""
    one = run(folder, f"{name}-one", dataclasses.replace(PARAMS, **settings))
    params = dataclasses.replace(PARAMS, processes=2, accelerate_config=str(config), **settings)
    monkeypatch.setenv("KILLED_BEFORE_STEP", "6")
    with pytest.raises(MemoryError, match="training in 2 processes failed: one was killed"):
        run(folder, name, params)
    assert len(list((folder / name / "scratch").glob("train-*/trainer/checkpoint-4"))) == 1
    monkeypatch.delenv("KILLED_BEFORE_STEP")
    two = run(folder, name, params)
    assert (two.layout, two.reference) == ("packed", "reused"), "no process may run a sharded tower alone"
    for key in ("loss", "rewards_margins", "logps_chosen", "learning_rate", "grad_norm"):
        assert [row[key] for row in log_rows(two)] == pytest.approx(
            [row[key] for row in log_rows(one)], rel=1e-5, abs=1e-5
        )
    for ours, theirs in zip(two.checkpoints, one.checkpoints, strict=True):
        weights, expected = (AutoModelForImageTextToText.from_pretrained(c).state_dict() for c in (ours, theirs))
        assert weights.keys() == expected.keys()
        off = {key: (weights[key] - expected[key]).abs().max().item() for key in expected}
        assert max(off.values()) < 1e-5, max(off, key=off.get)


def test_fsdp_in_two_processes_trains_what_one_does_also_after_a_kill(folder, on_cpus, monkeypatch):
    config = ROOT / "params" / "accelerate" / "fsdp2.yaml"
    assert_killed_and_resumed_run_equals_one_process(folder, "fsdp", config, monkeypatch)


def test_fsdp_in_bfloat16_starts_at_log_2_and_trains_what_one_process_does_up_to_rounding(folder, on_cpus):
    settings = {"dtype": "bfloat16", "gradient_checkpointing": True, "micro_batch_size": 1}
    one = log_rows(run(folder, "bf16-one", dataclasses.replace(PARAMS, **settings)))
    sharded = {"processes": 2, "accelerate_config": str(ROOT / "params" / "accelerate" / "fsdp2.yaml")}
    two = log_rows(run(folder, "bf16-fsdp", dataclasses.replace(PARAMS, **settings, **sharded)))
    assert two[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "steps compute as the reference did"
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=0.01)
    assert [row["grad_norm"] for row in two] == pytest.approx([row["grad_norm"] for row in one], rel=0.02)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_one_of_eight_processes_builds_no_second_model_and_holds_the_weights_once(folder, on_cpus, tmp_path):
    save_wide_llava(tmp_path / "model")
    save_pairs(tmp_path / "pairs.parquet", 32)
    config = ROOT / "params" / "accelerate" / "fsdp2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1"]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "helpers" / "one_of_eight.py"), str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 5e8 and found["most"] < 1.2 * found["weights"]
    assert (found["kept"], found["computed"], found["summed"]) == ("float32", "bfloat16", "float32")


@pytest.mark.parametrize("lora", [{}, {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_in_two_processes_trains_what_one_does_also_after_a_kill(folder, on_cpus, monkeypatch, stage, lora):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    config = ROOT / "params" / "accelerate" / f"{stage}.yaml"
    name = f"{stage}-lora" if lora else stage
    assert_killed_and_resumed_run_equals_one_process(folder, name, config, monkeypatch, **lora)


def test_lora_on_a_4_bit_base_trains_from_it_and_goes_on_to_the_same_bytes_after_a_kill(folder, on_cpus):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    params = dataclasses.replace(PARAMS, lora_r=4, lora_alpha=8, learning_rate=1e-2, load_in_4bit=True)
    result = run(folder, "qlora", params)
    rows = log_rows(result)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "the reference is the 4-bit base without adapter"
    assert rows[-1]["loss"] < 0.6
    before = AutoModelForImageTextToText.from_pretrained(folder / "model").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(result.checkpoints[-1]).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("language_model" in name and "_proj" in name for name in moved)
    again = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'helpers')!r}); "
    again += "import training_runs as t; from pathlib import Path; "
    again += f"t.run(Path({str(folder)!r}), 'qlora-killed', t.TrainParams(**{dataclasses.asdict(params)!r}))"
    environment = {**os.environ, "RANK": "0", "KILLED_BEFORE_STEP": "6"}
    killed = subprocess.run([sys.executable, "-c", again], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert run(folder, "qlora-killed", params).reference == "reused"
    assert digests(folder / "qlora-killed" / "out") == digests(folder / "qlora" / "out")


def test_4_bits_without_bitsandbytes_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs bitsandbytes, which is not installed: pip install bitsandb"):
        run(folder, "no-bitsandbytes", dataclasses.replace(PARAMS, lora_r=4, load_in_4bit=True))
