"""Preference training from pairs to checkpoints (RLAIF-V section 2.3): the public call, and the processes it starts.

accelerate launch -m rlaifv.training.job JOB.json    # what `train` starts itself for more than one process
"""

import dataclasses
import json
import logging
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from rlaifv import ROOT
from rlaifv.fingerprint import digest, digest_files, stage_sources
from rlaifv.params import TrainParams, check_train
from rlaifv.records import write_atomic
from rlaifv.store import FINISHED, lock_folder
from rlaifv.training import library_quirks
from rlaifv.training.checkpoints import WriteCheckpoints, published
from rlaifv.training.dpo import PairCollator, PairScorer, PairTrainer, reference_logps, training_arguments, write_log
from rlaifv.training.packed_pairs import choose_layout
from rlaifv.training.pair_data import PairData, read_pairs
from rlaifv.training.policy import add_lora, freeze, load_policy, own_device, reference_device, sharded
from rlaifv.training.reference import ReferenceStore
from rlaifv.training.run_folder import go_on_from, publish, read_finished, record_whole, remove
from rlaifv.vlm.checkpoint import fingerprint_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run did. `rejects` are (pair id, reason); `layout` is how pairs went through the model.

    Tokens per second are those of two rows a pair, prompt and image included, however they were computed.
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

    `pairs` is a parquet file or folder in the columns of the public RLAIF-V dataset. Work lives in `scratch/train-<h>`,
    h a hash of everything that determines the result; kill the run, call it again, and it ends with the same bytes. A
    finished run leaves `finished.json` and `published/` there, from which another call publishes at once; whoever
    removes such a folder takes its lock first. TensorBoard reads `scratch/tensorboard`.

    Raises ParamsError for parameters that do not fit each other, ValueError for those that do not fit the data,
    RuntimeError when another process is training the same, FloatingPointError (with the pair ids) when the loss or
    gradient is not finite; the checkpoints before that are in `out` then.
    """
    check_train(params)
    pairs, settings = Path(pairs).resolve(), dataclasses.asdict(params)
    read_pairs(pairs)  # pairs that cannot be read stop here
    made_of = {
        "policy": fingerprint_checkpoint(policy),
        "data": digest_files(*(sorted(pairs.glob("*.parquet")) or [pairs])),
        "source": stage_sources("train"),
    }
    identity = {**made_of, "params": {**settings, "collapse_nats": None}, "seed": seed}
    run = (scratch / f"train-{digest(identity)}").resolve()
    job = {"policy": policy, "pairs": str(pairs), "run": str(run), "params": settings, "seed": seed, "made_of": made_of}
    lock = lock_folder(run, "train")
    try:
        write_atomic(run / "job.json", json.dumps(job, indent=2))
        result = read_finished(run, published(params))
        if result is None:
            launch(run / "job.json", params) if params.processes > 1 else run_job(job)
            result = read_finished(run, published(params))
        if result is None:
            raise RuntimeError(f"training ended without all its checkpoints in {run}: call it again")
        publish(run, out)
        for unfinished in ("trainer", "adapter"):
            remove(run / unfinished)
    except FloatingPointError:
        publish(run, out)
        raise
    finally:
        lock.release()
    return TrainResult(
        checkpoints=[str(out / Path(part).name) for part in published(params)[:-1]],
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
    command += ["--main_process_port", "0", "-m", "rlaifv.training.job", str(job)]
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "ACCELERATE_USE_CPU": "true"}
    errors: list[str] = []
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout:
                print(line, end="")
                errors += re.findall(r"^(?:\[rank\d+\]: *)?(?:rlaifv\.store\.)?(\w*(?:Error|InUse): .*)", line)
        except BaseException:
            process.terminate()  # a cell that is interrupted takes its processes with it
            raise
    if process.returncode:
        first = errors[0] if errors else f"exit code {process.returncode}, see the output above"
        kind = FloatingPointError if first.startswith("FloatingPointError") else RuntimeError
        raise kind(f"training in {params.processes} processes failed: {first}")


def run_job(job: dict) -> None:
    """One process of a run: load, freeze, lay out, reference, train (or go on), write `finished.json`."""
    library_quirks.be_quiet()
    if sharded() and not torch.cuda.is_available():
        library_quirks.shard_on_cpus()
    run, params = Path(job["run"]), TrainParams(**job["params"])
    vlm = load_policy(job["policy"], params)
    data = PairData(vlm, Path(job["pairs"]), params.max_length)
    for reject in data.rejects:
        log.warning("pair %s is not trained on: %s", reject.id, reject.reason)
    if not data.pairs:
        raise ValueError(f"none of the {len(data.rejects)} pairs can be trained on; first: {data.rejects[:1]}")
    freeze(vlm.model, params)
    if sharded():
        # a process that lacks an image's features would run the tower alone, waiting for the others' parts of it
        params = dataclasses.replace(params, feature_cache_gb=0)
    elif not params.load_in_4bit:
        vlm.model.to(own_device())
    arguments = training_arguments(params, run / "trainer", job["seed"])  # also joins the other processes
    scorer = PairScorer(vlm.model)
    layout = choose_layout(scorer, vlm, data, params)
    packed, pad = layout.startswith("packed"), vlm.tokenizer.pad_token_id
    collate = PairCollator(data, pad, packed=packed, segment_weight=params.segment_weight)
    made_of = {
        **job["made_of"],
        "segment_weight": params.segment_weight,
        "dtype": params.dtype,
        "weights": "4 bit" if params.load_in_4bit else str(vlm.model.dtype),  # LoRA's base is not in float32
        "layout": layout,
    }
    store = ReferenceStore(run.parent, made_of, [pair.pair_id for pair in data.pairs])
    state, reference = PartialState(), store.load()
    reused = reference is not None
    if not reused:
        before, device = vlm.model.device, reference_device(vlm.model)
        # without gradients a batch of four times as many pairs takes less memory
        batch_size = 4 * params.micro_batch_size
        scorer.to(device)
        reference = reference_logps(scorer, collate, batch_size, device, params.dtype == "bfloat16")
        scorer.to(before)
        if state.is_main_process:
            store.save(reference)
    set_seed(job["seed"])
    if params.lora_r:
        scorer = PairScorer(add_lora(vlm.model, params), scorer.images)
    if params.gradient_checkpointing:
        library_quirks.checkpoint_activations(scorer.policy, lora=bool(params.lora_r))
    (last,) = broadcast_object_list([go_on_from(run) if state.is_main_process else None])
    if last:
        log.info("train: resuming from %s", last.name)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.parent / "tensorboard" / run.name)  # stays when the run is done
    trainer = PairTrainer(scorer, collate, reference, params, arguments)
    trainer.add_callback(WriteCheckpoints(trainer, vlm, params, run, job["policy"]))
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if not state.is_main_process:
        return
    history = trainer.state.log_history
    write_log(history, run / "published" / "log.csv")
    record_whole(run, "published/log.csv")
    result = {
        "steps": trainer.state.global_step,
        "pairs": len(data.pairs),
        "rejects": [(reject.id, reject.reason) for reject in data.rejects],
        "layout": layout,
        "reference": "reused" if reused else "computed",
    }
    for name in ("pairs_per_second", "tokens_per_second"):  # their medians, None for a run of one step
        values = [entry[f"throughput/{name}"] for entry in history if f"throughput/{name}" in entry]
        result[name] = statistics.median(values) if values else None
    write_atomic(run / FINISHED, json.dumps(result))


if __name__ == "__main__":
    from rlaifv.stage import start_logging

    start_logging()
    job = json.loads(Path(sys.argv[1]).read_text())
    if int(os.environ.get("RANK", "0")):
        logging.getLogger("rlaifv").setLevel(logging.ERROR)  # the first process speaks for all
    else:
        lock = lock_folder(Path(job["run"]) / "process", "train")  # it may outlive the one that called `train`
    run_job(job)
