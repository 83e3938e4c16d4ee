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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import set_seed

from rlaifv import ROOT
from rlaifv.fingerprint import digest, digest_files, stage_sources
from rlaifv.params import TrainParams, check_train
from rlaifv.records import to_json, write_atomic
from rlaifv.stage import gpu_peak, start_logging
from rlaifv.steps.public_pairs import parquet_files
from rlaifv.store import FINISHED, lock_folder
from rlaifv.store.processes import end_with_parent
from rlaifv.training import library_quirks
from rlaifv.training.checkpoints import WriteCheckpoints, checkpoints, published
from rlaifv.training.dev_scores import Dev
from rlaifv.training.dpo import (
    PairCollator,
    PairScorer,
    PairTrainer,
    StepTrainer,
    reference_logps,
    training_arguments,
    write_log,
)
from rlaifv.training.machines import command_of
from rlaifv.training.packed_pairs import choose_layout, image_source
from rlaifv.training.pair_data import PairData
from rlaifv.training.policy import add_lora, freeze, load_policy, sharded, whole_device
from rlaifv.training.reference import ReferenceStore
from rlaifv.training.run_folder import carry_out, go_on_from, record_whole
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run did. `rejects` are (pair id, reason); `layout` is how pairs went through the model.

    Tokens per second are those of two rows a pair, prompt and image included, however they were computed. The peak is
    the process's that held most of a GPU (`stage.gpu_peak`), reference log-probs and all; None without a GPU.
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
    peak_gpu_gb: float | None


def train(
    policy: str, pairs: Path, params: TrainParams, out: Path, scratch: Path, seed: int, dev: Dev | None = None
) -> TrainResult:
    """Train `policy` on the pairs in `pairs` and write `out/checkpoint-<k>`, k = 1..n, and `out/log.csv`.

    With `params.keep_checkpoints` each is scored on `dev` into `out/checkpoint-<k>.json` when it is written, and only
    the best of them are kept.

    `pairs` is a parquet file or folder in the columns of the public RLAIF-V dataset. Work lives in `scratch/train-<h>`,
    h a hash of everything that determines the result; kill the run, call it again, and it ends with the same bytes. A
    finished run leaves `finished.json` and `published/` there, from which another call publishes at once; whoever
    removes such a folder takes its lock first. TensorBoard reads `scratch/tensorboard`.

    Raises ParamsError for parameters that do not fit each other, ValueError for those that do not fit the data,
    RuntimeError when another process is training the same, FloatingPointError (with the pair ids) when the loss or
    gradient is not finite; the checkpoints before that are in `out` then.
    """
    check_train(params)
    if bool(params.keep_checkpoints) != (dev is not None):
        raise ValueError("train.keep_checkpoints chooses on dev: give both or none of them")
    pairs, settings = Path(pairs).resolve(), dataclasses.asdict(params)
    made_of = {
        "policy": fingerprint_checkpoint(policy),
        "data": digest_files(*parquet_files(pairs)),
        "source": stage_sources("train"),
    }
    asked = dev and dataclasses.asdict(dev)
    unseen = dict.fromkeys(("collapse_nats", "resume_every", "machines"))  # as many processes elsewhere: the same run
    identity = {**made_of, "params": settings | unseen, "seed": seed}
    identity["dev"] = dev and [asked, dev.data()]
    job = {"policy": policy, "pairs": str(pairs), "params": settings, "seed": seed, "made_of": made_of, "dev": asked}
    return run_in("train", identity, job, params, out, scratch, run_job)


def run_in(
    kind: str, identity: dict, job: dict, params: TrainParams, out: Path, scratch: Path, work: Callable[[dict], None]
) -> TrainResult:
    """Let `work` do a job in `scratch/KIND-<digest of identity>`, in as many processes as `params` has, and publish to
    `out` what it has written; `train` says what is promised of it."""
    run = (scratch / f"{kind}-{digest(identity)}").resolve()
    job = {**job, "run": str(run)}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.parent / "tensorboard" / run.name)  # stays when the run is done

    def start() -> None:
        write_atomic(run / "job.json", to_json(job, indent=2))
        launch(run / "job.json", params, work.__module__) if params.processes > 1 else work(job)

    result = carry_out(kind, run, published(params), out, start)
    return TrainResult(
        checkpoints=[str(out / Path(part).name) for part in checkpoints(params) if (run / part).is_dir()],
        rejects=[tuple(reject) for reject in result.pop("rejects")],
        log=str(out / "log.csv"),
        **result,
    )


def launch(job: Path, params: TrainParams, module: str) -> None:
    """Run the job in `params.processes` processes of `module`, on `params.machines` machines, and print their output
    here (a notebook cell shows it).

    What ended one of them is raised here, in one line: MemoryError for memory, FloatingPointError for a loss that is
    not finite, else RuntimeError.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(params.processes)]
    if params.accelerate_config:
        command += ["--config_file", str(ROOT / params.accelerate_config)]
    else:
        # also for processes on CPUs: it is accelerate's name for torchrun with plain data parallelism
        command += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
    one_machine = params.machines == 1
    command += ["--num_machines", "1", "--main_process_port", "0"] if one_machine else []
    command += ["-m", module, str(job)]
    if not one_machine:
        command = command_of(command, params.machines, params.processes)
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "ACCELERATE_USE_CPU": "true"}
    errors, killed = [], ""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, cwd=ROOT, preexec_fn=end_with_parent, **pipes) as process:
        try:
            for line in process.stdout:
                print(line, end="")
                errors += re.findall(r"^(?:\[rank\d+\]: *)?(?:\w+\.)*(\w*(?:Error|InUse): \S.*)", line)
                killed = killed or ("SIGKILL" if re.search(r"exitcode *: -9\b", line) else "")
        except BaseException:
            process.terminate()  # a cell that is interrupted takes its processes with it
            raise
    if process.returncode:
        first = errors[0] if errors else f"exit code {process.returncode}, see the output above"
        kind = FloatingPointError if first.startswith("FloatingPointError") else RuntimeError
        if killed or process.returncode == -9:  # what the others say then is that they lost it
            kind, first = MemoryError, "one was killed (SIGKILL), usually for memory"
        elif re.match(r"\w*(MemoryError|OutOfMemoryError)", first):
            kind = MemoryError
        raise kind(f"training in {params.processes} processes failed: {first}; the same command goes on where it was")


def run_job(job: dict) -> None:
    """One process of a run: load, freeze, lay out, reference, train (or go on), write `finished.json`."""
    library_quirks.be_quiet()
    if sharded() and not torch.cuda.is_available():
        library_quirks.shard_on_cpus()
    # the others wait where the first process works alone: half an hour would be too short for that
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    run, params = Path(job["run"]), TrainParams(**job["params"])
    vlm = load_policy(job["policy"], params)
    data = PairData(vlm, Path(job["pairs"]), params.max_length, run / "pairs")
    require_rows(data, "pair")
    freeze(vlm.model, params)
    if sharded():
        # a process that lacks an image's features would run the tower alone, waiting for the others' parts of it
        params = dataclasses.replace(params, feature_cache_gb=0)
    if not params.load_in_4bit:
        vlm.model.to(whole_device(vlm.model))
    scorer = PairScorer(vlm.model)
    layout = kept_layout(scorer, vlm, data, params, run)
    scorer.images = scorer.images or image_source(layout, data, vlm.model)
    packed, pad = layout.startswith("packed"), vlm.tokenizer.pad_token_id
    collate = PairCollator(data, pad, packed=packed, segment_weight=params.segment_weight)
    made_of = {
        **job["made_of"],
        "segment_weight": params.segment_weight,
        "dtype": params.dtype,
        "weights": "4 bit" if params.load_in_4bit else str(vlm.model.dtype),  # LoRA's base is not in float32
        "layout": layout,
    }
    store = ReferenceStore(run.parent, made_of, data.pairs.ids)
    reference = store.load()
    reused = reference is not None
    if not reused:
        # without gradients a batch of four times as many pairs takes less memory
        reference = reference_logps(scorer, collate, 4 * params.micro_batch_size, vlm.device, params.dtype)
        if state.is_main_process:
            store.save(reference)
    set_seed(job["seed"])
    if params.lora_r:
        scorer = PairScorer(add_lora(vlm.model, params), scorer.images)
    if params.gradient_checkpointing:
        library_quirks.checkpoint_activations(scorer.policy, lora=bool(params.lora_r))
    arguments = training_arguments(params, run / "trainer", job["seed"])
    trainer = PairTrainer(scorer, collate, reference, params, arguments)
    if sharded() and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise RuntimeError(f"{sharded()} spreads weights over GPUs only: set train.accelerate_config to null")
    writer = WriteCheckpoints(trainer, vlm, params, run, job["policy"], job["dev"] and Dev.read(job["dev"]))
    take_steps(trainer, writer, run, data, layout=layout, reference="reused" if reused else "computed")


def require_rows(data: PairData, what: str) -> None:
    """A log line for every row that cannot be trained on; ValueError where that leaves none."""
    for reject in data.rejects:
        log.warning("%s %s is not trained on: %s", what, reject.id, reject.reason)
    if not len(data.pairs):
        raise ValueError(f"none of the {len(data.rejects)} {what}s can be trained on; first: {data.rejects[:1]}")


def kept_layout(scorer: PairScorer, vlm: VLM, data: PairData, params: TrainParams, run: Path) -> str:
    """How rows go through the model, as the first process has found; a run that goes on does not look again."""
    main, kept = PartialState().is_main_process, run / "layout.txt"
    if main and not kept.is_file():
        write_atomic(kept, choose_layout(scorer, vlm, data, params))
    return broadcast_object_list([kept.read_text() if main else None])[0]


def take_steps(trainer: StepTrainer, writer: WriteCheckpoints, run: Path, data: PairData, **said: str) -> None:
    """Train, or go on where a killed run was, and write `finished.json`; `said` is what else it says."""
    main = PartialState().is_main_process
    (last,) = broadcast_object_list([go_on_from(run) if main else None])
    if last:
        log.info("train: resuming from %s", last.name)
    trainer.add_callback(writer)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    peaks = gather_object([gpu_peak()])
    if not main:
        return
    history = trainer.state.log_history
    write_log(history, run / "published" / "log.csv")
    record_whole(run, "published/log.csv", instead_of=writer.surplus())
    result = {
        "steps": trainer.state.global_step,
        "pairs": len(data.pairs),
        "rejects": [(reject.id, reject.reason) for reject in data.rejects],
        "peak_gpu_gb": max(peaks) or None,
        **said,
    }
    for name in ("pairs_per_second", "tokens_per_second"):  # their medians, None for a run of one step
        values = [entry[f"throughput/{name}"] for entry in history if f"throughput/{name}" in entry]
        result[name] = statistics.median(values) if values else None
    write_atomic(run / FINISHED, to_json(result))


def start_process(work: Callable[[dict], None], kind: str) -> None:
    """One process of `launch`: `work` on the job whose file is the command's argument."""
    start_logging()
    job = json.loads(Path(sys.argv[1]).read_text())
    lock = None
    if int(os.environ.get("RANK", "0")):
        logging.getLogger("rlaifv").setLevel(logging.ERROR)  # the first process speaks for all
    else:
        lock = lock_folder(Path(job["run"]) / "process", kind)  # it may outlive the one that called `train`
    try:
        work(job)
    finally:
        if lock:
            lock.release()


if __name__ == "__main__":
    start_process(run_job, "train")
