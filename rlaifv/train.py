"""Preference training: DPO on pairs of answers (RLAIF-V section 2.3), on top of TRL.

    accelerate launch -m rlaifv.train --job JOB.json    # what `train` starts itself for more than one process

Reference log-probs are computed once, each pair is one packed row, and the run can be killed at any moment: called
again it goes on and ends with the same bytes.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from rlaifv import ROOT
from rlaifv.preferences import read_pairs
from rlaifv.vlm import fingerprint_checkpoint


@dataclass(frozen=True)
class TrainParams:
    """Preference training. The paper's values are those of RLAIF-V (arXiv 2405.17220) and its released scripts."""

    beta: float = 0.1  # β of DPO: how strongly the policy is held to the reference (paper 0.1)
    learning_rate: float = 5e-7  # peak of the schedule (paper: full fine-tuning 5e-7, LoRA 1e-5)
    epochs: int = 4  # passes over the pairs (paper 4)
    batch_size: int = 8  # pairs per optimizer step over all processes (paper 8)
    micro_batch_size: int = 1  # pairs per forward pass of one process; the rest of batch_size is accumulated
    scheduler: str = "cosine"  # any schedule of transformers (paper cosine)
    warmup_ratio: float = 0.05  # share of the steps in which the learning rate rises (paper 0.05)
    weight_decay: float = 0.01  # of AdamW (paper 0.01)
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 turns it off (paper 1.0)
    loss_type: tuple[str, ...] = (
        "sigmoid",
    )  # TRL's losses; sigmoid is DPO's, sigmoid_norm its length-normalized form,
    # ipo, robust, apo_zero ...; several are added up; sft adds the negative log-likelihood of the chosen answer
    loss_weights: tuple[float, ...] | None = None  # one weight per loss_type; null is 1 each
    label_smoothing: float = 0.0  # share of pairs assumed to be labeled wrongly (robust, exo_pair, aot)
    segment_weight: float = 1.0  # weight of the tokens in which the two answers differ; 1 is DPO, RLHF-V's DDPO uses 5
    lora_r: int = 0  # rank of LoRA; 0 trains all weights (paper: full; its LoRA script 64)
    lora_alpha: int = 16  # LoRA's scale times r (paper 16)
    lora_dropout: float = 0.0  # makes log-ratios noisy, the reference has none (paper's script 0.05)
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # ^ linear layers of the language model that get an adapter
    load_in_4bit: bool = False  # QLoRA: the frozen base in 4 bits (needs bitsandbytes and a GPU)
    freeze_projector: bool = False  # the vision tower is always frozen; this freezes what joins it to the text as well
    dtype: str = "bfloat16"  # of computation and of written checkpoints; float32 on a CPU (paper bfloat16)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, 30 % more time
    max_length: int | None = None  # longest row in tokens, longer ones are rejected; null is the model's own limit
    checkpoints_per_epoch: int = 4  # a checkpoint every 1/n epoch (paper 4)
    packed: bool = True  # one row per pair; false is two rows as in TRL (an architecture that cannot is found out)
    feature_cache_gb: float = 8.0  # main memory for the frozen tower's features; 0 computes them anew each time
    collapse_nats: float = 0.5  # warn when chosen answers lose this much log-prob per token against the reference
    processes: int = 1  # processes (GPUs) to train on; more than one goes through `accelerate launch`
    accelerate_config: str | None = None  # an accelerate configuration file (params/accelerate/...), else plain DDP


@dataclass(frozen=True)
class TrainResult:
    """What a training run did. `rejects` are (pair id, reason); `layout` is how pairs went through the model."""

    checkpoints: list[str]
    steps: int
    pairs: int
    rejects: list[tuple[str, str]]
    layout: str
    reference: str
    log: str
    trained_tokens: int


def train(policy: str, pairs: Path, params: TrainParams, out: Path, scratch: Path, seed: int) -> TrainResult:
    """Train `policy` on the pairs in `pairs` and write `out/checkpoint-<k>`, k = 1..n, and `out/log.csv`.

    `pairs` is a parquet file or folder in the columns of the public RLAIF-V dataset. Resumable work lives in `scratch`
    under a hash of everything that determines the result; kill the run, call it again, and it ends with the same bytes.

    Raises ValueError for parameters that do not fit each other or the data, FloatingPointError (with the pair ids) when
    the loss or gradient is not finite; the checkpoints before that are in `out` then.
    """
    check_params(params)
    from rlaifv.trainer import run_job

    identity = {
        "policy": fingerprint_checkpoint(policy),
        "pairs": read_pairs(pairs)[1],
        "params": {k: v for k, v in dataclasses.asdict(params).items() if k != "collapse_nats"},
        "seed": seed,
    }
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    run = scratch / f"train-{key}"
    run.mkdir(parents=True, exist_ok=True)
    job = {
        "policy": policy,
        "pairs": str(Path(pairs).resolve()),
        "params": dataclasses.asdict(params),
        "run": str(run.resolve()),
        "seed": seed,
        "identity": identity,
    }
    (run / "job.json").write_text(json.dumps(job, indent=2))
    finished = run / "finished.json"
    try:
        if not finished.is_file():
            if params.processes > 1:
                launch(run / "job.json", params)
            else:
                run_job(job)
    finally:
        publish(run, out)
    result = json.loads(finished.read_text())
    shutil.rmtree(run)
    return TrainResult(
        checkpoints=[str(out / f"checkpoint-{k + 1}") for k in range(result.pop("n_checkpoints"))],
        rejects=[tuple(reject) for reject in result.pop("rejects")],
        log=str(out / "log.csv"),
        **result,
    )


def check_params(params: TrainParams) -> None:
    """Raise ValueError for values that cannot work together, before anything is loaded."""
    per_pass = params.micro_batch_size * params.processes
    if params.batch_size % per_pass:
        raise ValueError(
            f"train.batch_size {params.batch_size} is not a multiple of micro_batch_size x processes = "
            f"{params.micro_batch_size} x {params.processes}: the global batch would depend on the machine"
        )
    if params.loss_weights is not None and len(params.loss_weights) != len(params.loss_type):
        raise ValueError(
            f"train.loss_weights {params.loss_weights} must have one weight per loss_type {params.loss_type}"
        )
    if params.load_in_4bit and not params.lora_r:
        raise ValueError("train.load_in_4bit keeps the base model frozen: it needs train.lora_r > 0")
    if params.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"train.dtype is {params.dtype!r}, expected float32 or bfloat16")
    if params.accelerate_config and not (ROOT / params.accelerate_config).is_file():
        raise ValueError(f"train.accelerate_config {params.accelerate_config} does not exist")


def launch(job: Path, params: TrainParams) -> None:
    """Run the job in `params.processes` processes and print their output here (a notebook cell shows it)."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(params.processes)]
    if params.accelerate_config:
        command += ["--config_file", str(ROOT / params.accelerate_config)]
    else:
        # also for processes on CPUs: it is accelerate's name for torchrun with plain data parallelism
        command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "rlaifv.train", "--job", str(job)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        tail: list[str] = []
        for line in process.stdout:
            print(line, end="")
            tail = [*tail, line][-20:]
    if process.returncode:
        error = next((line for line in reversed(tail) if "Error" in line), f"exit code {process.returncode}").strip()
        kind = FloatingPointError if "FloatingPointError" in error else RuntimeError
        raise kind(f"training in {params.processes} processes failed: {error}")


def publish(run: Path, out: Path) -> None:
    """Replace what `out` holds of an earlier run by this run's checkpoints and log."""
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("checkpoint-*"), *out.glob("log.csv")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for new in sorted((run / "published").glob("*")):
        if new.is_dir() and new.suffix != ".partial":
            shutil.copytree(new, out / new.name)
        elif new.name == "log.csv":
            shutil.copyfile(new, out / new.name)


if __name__ == "__main__":
    from rlaifv.stage import start_logging
    from rlaifv.trainer import run_job

    parser = argparse.ArgumentParser(description="One process of a training job (started by rlaifv.train.train)")
    parser.add_argument("--job", type=Path, required=True)
    start_logging()
    if int(os.environ.get("RANK", "0")):
        logging.getLogger("rlaifv").setLevel(logging.ERROR)  # the first process speaks for all
    run_job(json.loads(parser.parse_args().job.read_text()))
