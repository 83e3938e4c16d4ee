"""One process of a training run: load, freeze, lay out, train or resume, write checkpoints."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig

from rlaifv.params import TrainParams
from rlaifv.records import write_atomic
from rlaifv.training.checkpoints import merge, write_adapter, write_checkpoint
from rlaifv.training.dpo_trainer import PairCollator, PairTrainer, Watch, write_log
from rlaifv.training.layout import choose_layout
from rlaifv.training.pair_data import PairData
from rlaifv.training.policy import freeze, load_policy, lora_config, own_device, sharded
from rlaifv.training.reference import ReferenceStore
from rlaifv.training.run_folder import last_checkpoint, numbered, take_lock, throughput
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)


def be_quiet() -> None:
    """No usage statistics, and no progress bars of libraries between our own log lines."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports the use of its trainers otherwise
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def run_job(job: dict) -> None:
    """Train in this process (one of several under `accelerate launch`), resuming what is in the job's folder."""
    be_quiet()
    main = int(os.environ.get("RANK", "0")) == 0
    with take_lock(Path(job["run"])) if main else contextlib.nullcontext():
        train_pairs(job, main)


def train_pairs(job: dict, main: bool) -> None:
    """The run itself; the `main` process writes the log and the result."""
    params = TrainParams(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["params"].items()})
    run = Path(job["run"])
    vlm = load_policy(job["policy"], params)
    data = PairData(vlm, Path(job["pairs"]), params.max_length)
    for reject in data.rejects:
        log.warning("pair %s is not trained on: %s", reject.id, reject.reason)
    if not data.pairs:
        raise ValueError(f"none of the {len(data.rejects)} pairs can be trained on; first: {data.rejects[:1]}")
    freeze(vlm.model, params)
    if not sharded() and not params.load_in_4bit:
        vlm.model.to(own_device())
    if sharded():
        # a process that lacks an image's features would run the tower alone, waiting for the others' parts of it
        params = dataclasses.replace(params, feature_cache_gb=0)
    layout = choose_layout(vlm, data, params)
    trainer = make_trainer(vlm, data, params, run, job, layout)
    if sharded() and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise RuntimeError(f"{sharded()} spreads weights over GPUs only: set train.accelerate_config to null")
    last = last_checkpoint(run / "trainer")
    if last:
        log.info("train: resuming from %s", last.name)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if main:
        write_log(trainer.state.log_history, run / "published" / "log.csv")
        result = {
            "n_checkpoints": params.epochs * params.checkpoints_per_epoch,
            "steps": trainer.state.global_step,
            "pairs": len(data.pairs),
            "rejects": [(reject.id, reject.reason) for reject in data.rejects],
            "layout": layout,
            "reference": "reused" if trainer.reference.reused else "computed",
            **throughput(trainer.state.log_history),
        }
        write_atomic(run / "finished.json", json.dumps(result))


def make_trainer(vlm: VLM, data: PairData, params: TrainParams, run: Path, job: dict, layout: str) -> PairTrainer:
    """A `PairTrainer` for this run; the reference log-probs are computed or read here."""
    collator = PairCollator(
        data, vlm.tokenizer.pad_token_id, packed=layout.startswith("packed"), segment_weight=params.segment_weight
    )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.parent / "tensorboard" / run.name)  # stays when the run is done
    args = training_arguments(params, run / "trainer", job["seed"])
    made_of = {
        "policy": job["identity"]["policy"],
        "data": job["identity"]["pairs"],
        "source": job["identity"]["source"],
        "segment_weight": params.segment_weight,
        "dtype": params.dtype,
        "weights": "4 bit" if params.load_in_4bit else str(vlm.model.dtype),  # LoRA's base is not in float32
        "layout": layout,
    }
    reference = ReferenceStore(run.parent, made_of, [pair.pair_id for pair in data.pairs])
    for module in vlm.model.modules():  # as TRL does, but before LoRA's own dropout joins
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if sharded() == "fsdp":
        # transformers also lists classes of parts that this model has not (CLIP's text side); accelerate wants all
        classes = {type(module).__name__ for module in vlm.model.modules()}
        vlm.model._no_split_modules = sorted(classes & set(vlm.model._no_split_modules or ()))
    trainer = PairTrainer(
        model=vlm.model,
        args=args,
        data=data,
        reference=reference,
        data_collator=collator,
        train_dataset=numbered(len(data.pairs), run / "dataset"),
        processing_class=vlm.processor or vlm.tokenizer,
        peft_config=lora_config(vlm.model, params) if params.lora_r else None,
    )
    if trainer.is_fsdp_enabled:
        # autocast computes in bfloat16, as for the reference; accelerate's policy would also round log-probs (-120 to
        # 0.5 nats) and sum the gradients in bfloat16
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if params.load_in_4bit:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                # TRL rounds a 4-bit model's adapters to bfloat16, in which small steps vanish; ours are float32 always
                parameter.data = parameter.data.float()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Watch(params.beta, params.collapse_nats))
    trainer.add_callback(Publish(trainer, vlm, params, run, job["policy"]))
    return trainer


def training_arguments(params: TrainParams, folder: Path, seed: int) -> DPOConfig:
    """TRL's arguments for our parameters."""
    args = DPOConfig(
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
        activation_checkpointing=params.gradient_checkpointing,  # their new name for it; TRL reads the old one from it
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
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    args._n_gpu = min(args.n_gpu, 1)  # a process is one GPU, also where more are visible (TRL refuses DataParallel)
    return args


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
            with whole_models(trainer):
                merge(self.policy, self.run / "adapter", out, params.dtype)
        else:
            write_checkpoint(model, self.vlm.processor or self.vlm.tokenizer, out, params.dtype, weights)


@contextlib.contextmanager
def whole_models(trainer: PairTrainer) -> Iterator[None]:
    """Within the block `from_pretrained` loads a whole model in this process. Under ZeRO-3 it would load a part of it
    and wait for the other processes to load theirs, and they wait for this one to have written the checkpoint."""
    config = getattr(trainer.args, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)
