"""Preference training: DPO on pairs of answers (RLAIF-V section 2.3), on top of TRL.

    accelerate launch -m rlaifv.train --job JOB.json    # what `train` starts itself for more than one process

Reference log-probs are computed once, each pair is one packed row, and the run can be killed at any moment: called
again it goes on and ends with the same bytes.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig

from rlaifv import ROOT
from rlaifv.checkpoints import merge, write_adapter, write_checkpoint
from rlaifv.dpo import PairCollator, PairTrainer, Watch, write_log
from rlaifv.packing import FrozenTower, ImageInputs, RowReader, answer_logps, build_batch
from rlaifv.params import TrainParams
from rlaifv.preferences import PairData
from rlaifv.reference import ReferenceStore
from rlaifv.vlm import VLM, load_vlm, resolve_checkpoint

PROJECTOR = ("projector", "merger", "connector", "aligner", "resampler", "image_newline")
"""Words in the names of the parameters between vision tower and language model, over all architectures."""


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
    trained_tokens: int = field(default=0)


def train(policy: str, pairs: Path, params: TrainParams, out: Path, scratch: Path, seed: int) -> TrainResult:
    """Train `policy` on the pairs in `pairs` and write `out/checkpoint-<k>`, k = 1..n, and `out/log.csv`.

    `pairs` is a parquet file or folder in the columns of the public RLAIF-V dataset. Resumable work lives in `scratch`
    under a hash of everything that determines the result; kill the run, call it again, and it ends with the same bytes.

    Raises ValueError for parameters that do not fit each other or the data, FloatingPointError (with the pair ids) when
    the loss or gradient is not finite; the checkpoints before that are in `out` then.
    """
    check_params(params)
    from rlaifv.preferences import read_pairs
    from rlaifv.vlm import fingerprint_checkpoint

    identity = {
        "policy": fingerprint_checkpoint(policy),
        "pairs": read_pairs(pairs)[1],
        "params": {k: v for k, v in dataclasses.asdict(params).items() if k not in ("num_workers", "collapse_nats")},
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
        command += ["--multi_gpu" if torch.cuda.is_available() else "--cpu", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "rlaifv.train", "--job", str(job)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
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


def run_job(job: dict) -> None:
    """Train in this process (one of several under `accelerate launch`), resuming what is in the job's folder."""
    params = TrainParams(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["params"].items()})
    run = Path(job["run"])
    main = int(os.environ.get("RANK", "0")) == 0
    say = print if main else (lambda text: None)
    vlm = load_policy(job["policy"], params)
    data = PairData(vlm, Path(job["pairs"]), params.max_length)
    for reject in data.rejects:
        say(f"rejected pair {reject.pair_id}: {reject.reason}")
    if not data.pairs:
        raise ValueError(f"none of the {len(data.rejects)} pairs can be trained on; first: {data.rejects[:1]}")
    freeze(vlm.model, params)
    reader, layout = choose_layout(vlm, data, params, say)
    trainer = make_trainer(vlm, data, params, run, job, layout, say)
    last = last_checkpoint(run / "trainer")
    if last:
        say(f"resuming at step {json.loads((last / 'trainer_state.json').read_text())['global_step']}")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if main:
        write_log(trainer.state.log_history, run / "published" / "log.csv")
        result = {
            "n_checkpoints": params.epochs * params.checkpoints_per_epoch,
            "steps": trainer.state.global_step,
            "pairs": len(data.pairs),
            "rejects": [(reject.pair_id, reject.reason) for reject in data.rejects],
            "layout": layout,
            "reference": "reused" if trainer.reference.reused else "computed",
            "trained_tokens": sum(
                len(p.chosen) + len(p.rejected) - p.chosen_start - p.rejected_start for p in data.pairs
            ),
        }
        (run / "finished.json").write_text(json.dumps(result))


def load_policy(policy: str, params: TrainParams) -> VLM:
    """The policy in main memory, its weights in the dtype that the optimizer needs.

    Full fine-tuning in bfloat16 keeps float32 weights (steps of 5e-7 vanish in bfloat16's 8 bits) and computes in
    bfloat16; a frozen LoRA base, and a model that DeepSpeed keeps its own float32 copy of, are loaded in bfloat16.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    dtype = params.dtype if params.lora_r or deepspeed else "float32"
    vlm = load_vlm(policy, dtype=dtype, device="cpu")
    if not params.load_in_4bit:
        return vlm
    source, revision = resolve_checkpoint(policy)
    quantized = AutoModelForImageTextToText.from_pretrained(
        source,
        revision=revision,
        use_safetensors=True,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        device_map={"": int(os.environ.get("LOCAL_RANK", "0"))},
    )
    return dataclasses.replace(vlm, model=quantized.requires_grad_(False))


def freeze(model: PreTrainedModel, params: TrainParams) -> None:
    """Let only the language model learn, and the projector unless it is frozen; never the vision tower."""
    if params.lora_r:
        return  # the adapters that PEFT adds are all that learns
    tower = {id(p) for p in vision_tower(model).parameters()} if vision_tower(model) is not None else set()
    for name, parameter in model.named_parameters():
        projector = any(word in name for word in PROJECTOR)
        parameter.requires_grad_(not params.freeze_projector if projector else id(parameter) not in tower)


def vision_tower(model: PreTrainedModel) -> torch.nn.Module | None:
    """The model's image encoder."""
    tower = model.get_encoder(modality="image")
    return None if tower is model or tower is model.base_model else tower


@torch.no_grad()
def choose_layout(vlm: VLM, data: PairData, params: TrainParams, say: Callable[[str], None]) -> tuple[RowReader, str]:
    """The fastest way through the model that gives the plain way's log-probs on two real pairs.

    Plain is two rows per pair and images encoded each time. What fails the check is named in a warning and not used.
    """
    by_length = sorted(data.pairs, key=lambda p: len(p.prompt) + len(p.chosen) + len(p.rejected))
    sample = [by_length[0], by_length[-1]]
    pad = vlm.tokenizer.pad_token_id
    plain_images = ImageInputs(data)
    reader = RowReader(vlm.model, plain_images)
    device = vlm.device
    batches = {
        packed: _to(build_batch(sample, pad, packed=packed), device)
        for packed in ((True, False) if params.packed else (False,))
    }
    expected = answer_logps(vlm.model, batches[False])
    limit = 1e-4 if vlm.model.dtype == torch.float32 else 0.1
    cached = None
    tower = vision_tower(vlm.model)
    if tower is not None and params.feature_cache_gb and not any(p.requires_grad for p in tower.parameters()):
        cached = FrozenTower(data, tower)
    for packed, images in ((True, cached), (True, plain_images), (False, cached)):
        name = f"{'packed' if packed else 'plain'}{' with cached features' if images is cached else ''}"
        if packed not in batches or images is None:
            continue
        reader.images = images
        try:
            found = answer_logps(vlm.model, batches[packed])
            off = (found - expected).abs().max().item()
        except Exception as error:
            say(f"WARNING {vlm.name} cannot train {name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if not off <= limit:
            say(f"WARNING {vlm.name} cannot train {name}: log-probs differ by {off:.2g} from two plain rows")
            continue
        if images is cached:
            need = cached.bytes_per_image() * len(data.prompts) / 1e9
            if need > params.feature_cache_gb:
                say(
                    f"features need {need:.1f} GB, more than train.feature_cache_gb {params.feature_cache_gb}: not kept"
                )
                continue
        say(f"training {name}: log-probs equal two plain rows within {off:.1g}")
        return reader, name
    reader.images = plain_images
    return reader, "plain"


def _to(value, device: torch.device):
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def make_trainer(
    vlm: VLM, data: PairData, params: TrainParams, run: Path, job: dict, layout: str, say: Callable[[str], None]
) -> PairTrainer:
    """A `PairTrainer` for this run; the reference log-probs are computed or read here."""
    collator = PairCollator(
        data, vlm.tokenizer.pad_token_id, packed=layout.startswith("packed"), segment_weight=params.segment_weight
    )
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports the use of its trainers otherwise
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")
    args = training_arguments(params, run / "trainer", job["seed"])
    made_of = {
        "policy": job["identity"]["policy"],
        "data": job["identity"]["pairs"],
        "segment_weight": params.segment_weight,
        "dtype": params.dtype,
        "load_in_4bit": params.load_in_4bit,
    }
    reference = ReferenceStore(run.parent, made_of, [pair.pair_id for pair in data.pairs], say)
    for module in vlm.model.modules():  # as TRL does, but before LoRA's own dropout joins
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = PairTrainer(
        model=vlm.model,
        args=args,
        data=data,
        reference=reference,
        data_collator=collator,
        train_dataset=Dataset.from_dict({"pair": list(range(len(data.pairs)))}),
        processing_class=vlm.processor or vlm.tokenizer,
        peft_config=lora_config(vlm.model, params) if params.lora_r else None,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Watch(params.beta, params.collapse_nats, say))
    trainer.add_callback(Publish(trainer, vlm, params, run, job["policy"]))
    return trainer


def training_arguments(params: TrainParams, folder: Path, seed: int) -> DPOConfig:
    """TRL's arguments for our parameters."""
    return DPOConfig(
        output_dir=str(folder),
        beta=params.beta,
        loss_type=list(params.loss_type),
        loss_weights=list(params.loss_weights) if params.loss_weights else None,
        label_smoothing=params.label_smoothing,
        learning_rate=params.learning_rate,
        num_train_epochs=params.epochs,
        per_device_train_batch_size=params.micro_batch_size,
        gradient_accumulation_steps=params.batch_size // (params.micro_batch_size * params.processes),
        lr_scheduler_type=params.scheduler,
        warmup_steps=params.warmup_ratio,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        bf16=params.dtype == "bfloat16",
        gradient_checkpointing=params.gradient_checkpointing,
        precompute_ref_log_probs=True,
        disable_dropout=False,  # done already; LoRA's own stays
        max_length=None,  # never cut an answer
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # `Publish` says when
        save_total_limit=1,
        report_to="tensorboard",
        disable_tqdm=True,
        seed=seed,
        dataloader_num_workers=params.num_workers,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def lora_config(model: PreTrainedModel, params: TrainParams) -> LoraConfig:
    """LoRA on the language model's linear layers; vision tower and projector stay as they are."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    targets = "|".join(re.escape(target) for target in params.lora_targets)
    return LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=rf"{re.escape(name)}\..*\.({targets})",
        task_type="CAUSAL_LM",
    )


class Publish(TrainerCallback):
    """Writes checkpoint k after k/n of an epoch's steps, and then lets the Trainer write one it can resume from."""

    def __init__(self, trainer: PairTrainer, vlm: VLM, params: TrainParams, run: Path, policy: str):
        self.trainer, self.vlm, self.params, self.run, self.policy = trainer, vlm, params, run, policy

    def on_step_end(self, args, state, control, **kwargs):
        n = self.params.epochs * self.params.checkpoints_per_epoch
        due = [k for k in range(1, n + 1) if max(1, round(k * state.max_steps / n)) == state.global_step]
        for k in due:
            self._write(self.run / "published" / f"checkpoint-{k}")
        control.should_save = bool(due)
        return control

    def _write(self, out: Path) -> None:
        trainer, params = self.trainer, self.params
        # every process takes part: the weights may be spread over all of them
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if not trainer.accelerator.is_main_process:
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        if params.lora_r:
            write_adapter(model, self.run / "adapter", weights)
            merge(self.policy, self.run / "adapter", out, params.dtype)
        else:
            write_checkpoint(model, self.vlm.processor or self.vlm.tokenizer, out, params.dtype, weights)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete Trainer checkpoint; half-written ones (a kill while saving) are deleted."""
    complete = {}
    for path in folder.glob("checkpoint-*"):
        try:
            complete[json.loads((path / "trainer_state.json").read_text())["global_step"]] = path
        except (OSError, ValueError):
            shutil.rmtree(path)
    return complete[max(complete)] if complete else None


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
    parser = argparse.ArgumentParser(description="One process of a training job (started by rlaifv.train.train)")
    parser.add_argument("--job", type=Path, required=True)
    run_job(json.loads(parser.parse_args().job.read_text()))
