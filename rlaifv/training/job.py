"""Preference training: DPO on pairs of answers (RLAIF-V section 2.3), on top of TRL.

    accelerate launch -m rlaifv.training.job --job JOB.json    # what `train` starts itself for more than one process

Reference log-probs are computed once, each pair is one packed row, and the run can be killed at any moment: called
again it goes on and ends with the same bytes.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from rlaifv import ROOT
from rlaifv.fingerprint import stage_sources
from rlaifv.params import TrainParams, check_train
from rlaifv.training.pair_data import read_pairs
from rlaifv.vlm.loading import fingerprint_checkpoint


@dataclass(frozen=True)
class TrainResult:
    """What a training run did. `rejects` are (pair id, reason); `layout` is how pairs went through the model.

    Tokens per second are TRL's: those of two rows a pair, prompt and image included, however they were computed.
    """

    checkpoints: list[str]
    steps: int
    pairs: int
    rejects: list[tuple[str, str]]
    layout: str
    reference: str
    log: str
    pairs_per_second: float | None
    tokens_per_second: float | None


def train(policy: str, pairs: Path, params: TrainParams, out: Path, scratch: Path, seed: int) -> TrainResult:
    """Train `policy` on the pairs in `pairs` and write `out/checkpoint-<k>`, k = 1..n, and `out/log.csv`.

    `pairs` is a parquet file or folder in the columns of the public RLAIF-V dataset. Resumable work lives in `scratch`
    under a hash of everything that determines the result; kill the run, call it again, and it ends with the same bytes.
    TensorBoard reads `scratch/tensorboard`, during the run and after it.

    Raises ParamsError for parameters that do not fit each other, ValueError for those that do not fit the data,
    FloatingPointError (with the pair ids) when the loss or gradient is not finite; the checkpoints before that are in
    `out` then.
    """
    check_train(params)
    from rlaifv.training.dpo import run_job

    identity = {
        "policy": fingerprint_checkpoint(policy),
        "pairs": read_pairs(pairs)[1],
        "params": {k: v for k, v in dataclasses.asdict(params).items() if k != "collapse_nats"},
        "seed": seed,
        "source": stage_sources("train"),
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
    except FloatingPointError:
        publish(run, out)  # the checkpoints before it are good
        raise
    publish(run, out)
    result = json.loads(finished.read_text())
    shutil.rmtree(run)
    return TrainResult(
        checkpoints=[str(out / f"checkpoint-{k + 1}") for k in range(result.pop("n_checkpoints"))],
        rejects=[tuple(reject) for reject in result.pop("rejects")],
        log=str(out / "log.csv"),
        **result,
    )


def launch(job: Path, params: TrainParams) -> None:
    """Run the job in `params.processes` processes and print their output here (a notebook cell shows it)."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(params.processes)]
    if params.accelerate_config:
        command += ["--config_file", str(ROOT / params.accelerate_config)]
    else:
        # also for processes on CPUs: it is accelerate's name for torchrun with plain data parallelism
        command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "rlaifv.training.job", "--job", str(job)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    errors: list[str] = []
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout:
                print(line, end="")
                errors += re.findall(r"^(?:\[rank\d+\]: *)?(\w*Error: .*)", line)
        except BaseException:
            process.terminate()  # a cell that is interrupted takes its processes with it
            raise
    if process.returncode:
        first = errors[0] if errors else f"exit code {process.returncode}, see the output above"
        kind = FloatingPointError if first.startswith("FloatingPointError") else RuntimeError
        raise kind(f"training in {params.processes} processes failed: {first}")


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
    from rlaifv.training.dpo import run_job

    parser = argparse.ArgumentParser(description="One process of a training job (started by rlaifv.training.job.train)")
    parser.add_argument("--job", type=Path, required=True)
    start_logging()
    if int(os.environ.get("RANK", "0")):
        logging.getLogger("rlaifv").setLevel(logging.ERROR)  # the first process speaks for all
    run_job(json.loads(parser.parse_args().job.read_text()))
