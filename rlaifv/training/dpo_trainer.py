"""`trl.DPOTrainer` on packed pairs: its losses, metrics, PEFT and resume, without its four image passes a step.

What is overridden: how a batch is laid out (`rlaifv.training.packed_pairs`), where reference log-probs come from
(`rlaifv.training.reference`), the order of the data, and what happens when training goes wrong.
"""

import contextlib
import csv
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from rlaifv.training.packed_pairs import build_batch, score_logits, segment_weights
from rlaifv.training.pair_data import PairData
from rlaifv.training.reference import COLUMNS, ReferenceStore

log = logging.getLogger(__name__)

LOG_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "length/chosen",
    "length/rejected",
    "learning_rate",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
)

SMALL_VOCABULARY = 4096
"""Up to so many tokens a CPU holds all logits of a batch at once (`packed_pairs.score_logits`)."""


class PairCollator:
    """Turns rows of the trainer's dataset (`pair`: an index, perhaps reference log-probs) into a batch."""

    def __init__(self, data: PairData, pad_token_id: int, *, packed: bool, segment_weight: float = 1.0):
        self.data, self.pad_token_id = data, pad_token_id
        self.packed, self.segment_weight = packed, segment_weight

    def __call__(self, examples: list[dict]) -> dict:
        pairs = [self.data.pairs[example["pair"]] for example in examples]
        batch = build_batch(pairs, self.pad_token_id, packed=self.packed)
        batch["pairs"] = [example["pair"] for example in examples]
        if self.segment_weight != 1.0:
            batch["weights"] = segment_weights(pairs, batch["input_ids"].shape[1], self.segment_weight)
        for key in COLUMNS:
            if key in examples[0]:
                batch[key] = torch.tensor([example[key] for example in examples])
        return batch


class EpochOrder(Sampler[int]):
    """A new permutation of the pairs each epoch, from (seed, epoch) alone; the incomplete last batch is left out.

    The epoch is read off the trainer's step, so an interrupted epoch goes on in its own order, and every step sees
    the same pairs on any number of processes. Within a step the longest pairs come first, so that a micro-batch holds
    rows of like length and little padding; which pairs make a step is left to chance.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, step: Callable[[], int]):
        n = len(lengths)
        if n < batch_size:
            raise ValueError(f"{n} pairs do not fill one batch: set train.batch_size (now {batch_size}) to {n} or less")
        self.lengths = torch.tensor(lengths)
        self.batch_size, self.seed, self.step = batch_size, seed, step
        self.steps_per_epoch = n // batch_size
        self.length = self.steps_per_epoch * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        epoch = self.step() // self.steps_per_epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        steps = torch.randperm(len(self.lengths), generator=generator)[: self.length].view(-1, self.batch_size)
        by_length = self.lengths[steps].argsort(dim=1, descending=True, stable=True)
        yield from steps.gather(1, by_length).flatten().tolist()


class PairTrainer(DPOTrainer):
    """DPOTrainer over `PairData`. `model` must be read by a `packed_pairs.RowReader`."""

    def __init__(self, *args, data: PairData, reference: ReferenceStore, **kwargs):
        self.pair_data, self.reference = data, reference
        self.now_training_on: list[str] = []
        self._last_log: tuple[float, int, int] | None = None  # time, step, tokens
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset  # the pairs are tokenized already, jointly

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["pair", *COLUMNS]

    def _get_train_sampler(self, train_dataset=None):
        return EpochOrder(self._lengths(), pairs_per_step(self.args), self.args.seed, lambda: self.state.global_step)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        stored = self.reference.load()
        if stored is None:
            stored = self._compute_ref_logps(dataset, name, batch_size)
            if self.accelerator.is_main_process:
                self.reference.save(stored)
            self.accelerator.wait_for_everyone()
        for key, values in stored.items():
            dataset = dataset.add_column(key, list(values))
        return dataset

    def _compute_ref_logps(self, dataset, name, batch_size) -> dict[str, np.ndarray]:
        """TRL's own pass over the pairs, the longest first: rows of one length need little padding, and a batch that
        is too large fails at once. Without gradients a batch of four times as many pairs takes less memory."""
        if self.is_fsdp_enabled:
            # TRL has loaded a second model, which cannot read our rows; the policy itself is not sharded yet
            self.ref_model = None
            self.model.to(self.accelerator.device)
        order = np.argsort(-np.array(self._lengths()), kind="stable")
        # TRL caches what it computes under the dataset's fingerprint: ours says everything that determines it
        by_length = dataset.select(order, new_fingerprint=self.reference.fingerprint)
        # ZeRO-3 records the order of modules in the first pass and fails in training when there was no second one
        larger = batch_size if self.is_deepspeed_enabled else 4 * batch_size
        with_logps = super()._precompute_ref_logps(by_length, name, larger)
        if self.is_fsdp_enabled:
            self.model.to("cpu")
        place = np.argsort(order)
        return {key: np.asarray(with_logps[key], np.float32)[place] for key in COLUMNS}

    def _lengths(self) -> list[int]:
        return [pair.row_length for pair in self.pair_data.pairs]

    def compute_ref_log_probs(self, model, inputs):
        model, inputs = self._model_and_inputs(model, inputs)
        self.reference.report(len(self.now_training_on) * self.args.world_size)
        return super().compute_ref_log_probs(model, inputs)

    def _model_and_inputs(self, model, inputs):
        """Take out of a batch what is not for TRL; the model then scores answers in the way that suits it, and weighs
        its log-probs where weights are given."""
        inputs = dict(inputs)
        self.now_training_on = [self.pair_data.pairs[i].pair_id for i in inputs.pop("pairs")]
        weights = inputs.pop("weights", None)
        at_once = self._scores_at_once()

        def scored(*, labels, fused_lm_head, **kwargs):
            if at_once:
                outputs = model(**kwargs)
                for key, value in score_logits(outputs.logits, labels).items():
                    setattr(outputs, key, value)
            else:
                outputs = model(labels=labels, fused_lm_head=fused_lm_head, **kwargs)
            if weights is not None:
                outputs.log_probs = outputs.log_probs * weights
            return outputs

        return scored, inputs

    def _scores_at_once(self) -> bool:
        """Whether the model's own head is faster than TRL's; a sharded model takes the way that it takes on GPUs."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        small = self.model.config.get_text_config().vocab_size <= SMALL_VOCABULARY
        return small and self.accelerator.device.type == "cpu" and not (sharded or self.use_weighting)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model, inputs = self._model_and_inputs(model, inputs)
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            # TRL takes the head's weight without calling the head, and only a call would make FSDP gather it: TRL then
            # does so itself, and each process would learn from its own pairs' gradient of its part of the head
            head.unshard()
        # accelerate wraps a model's forward in autocast, but not a model that FSDP shards
        with self.accelerator.autocast() if self.is_fsdp_enabled else contextlib.nullcontext():
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        value = loss[0] if return_outputs else loss
        if not torch.isfinite(value):
            raise FloatingPointError(self._went_wrong(f"the loss is {value.item()}"))
        metrics = self._metrics["train" if self.model.training else "eval"]
        lengths = inputs["completion_mask"].sum(dim=1).float()
        for key, part in zip(("length/chosen", "length/rejected"), lengths.chunk(2), strict=True):
            metrics[key].append(self.accelerator.gather(part).mean().item())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise FloatingPointError(self._went_wrong(f"the gradient norm is {norm}"))
        return norm

    def create_model_card(self, *args, **kwargs):
        """Its checkpoints are there to be resumed; a card for people is `rlaifv.export`'s."""

    def _went_wrong(self, what: str) -> str:
        pairs = ", ".join(self.now_training_on)
        return (
            f"{what} at step {self.state.global_step + 1}, pairs {pairs}: training stops and keeps the checkpoints "
            f"before it; look at these pairs, lower train.learning_rate or use train.dtype float32"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if is_peft_model(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # `save_pretrained` writes LLaVA and others under the hub's parameter names; the Trainer loads without undoing
        # that, matches nothing, warns, and goes on from the weights of step 0
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
        return None

    def log(self, logs, start_time=None):
        """Adds what was trained per second since the last log (for TensorBoard; `write_log` leaves times out)."""
        now, tokens = time.monotonic(), self._total_train_tokens
        if self._last_log is not None and "loss" in logs:
            seconds, steps, before = (
                now - self._last_log[0],
                self.state.global_step - self._last_log[1],
                self._last_log[2],
            )
            logs["throughput/pairs_per_second"] = steps * pairs_per_step(self.args) / seconds
            logs["throughput/tokens_per_second"] = (tokens - before) / seconds
        self._last_log = (now, self.state.global_step, tokens)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs):
        return 0  # the Trainer's estimate walks over all parameters each step and counts only `input_ids`


class Watch(TrainerCallback):
    """One line every few seconds, throughput for TensorBoard, and a warning when chosen answers lose their likelihood.

    DPO only widens a margin: it can do so by pushing both answers down. `rewards/chosen` / (β · length) is the mean
    change of a chosen answer's log-prob per token, in nats.
    """

    def __init__(self, beta: float, collapse_nats: float, every_s: float = 5.0):
        self.beta, self.collapse_nats, self.every_s = beta, collapse_nats, every_s
        self.recent: list[float] = []
        self.warned = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.said = time.monotonic()
        self.first_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "rewards/chosen" not in (logs or {}):
            return
        self.recent = [*self.recent, logs["rewards/chosen"] / (self.beta * logs["length/chosen"])][-20:]
        change = sum(self.recent) / len(self.recent)
        if len(self.recent) == 20 and change < -self.collapse_nats and not self.warned:
            self.warned = True
            log.warning(
                "step %d: chosen answers have lost %.2f nats per token against the reference (train.collapse_nats %g): "
                "the model is forgetting, not preferring; lower train.learning_rate, raise train.beta or add the sft "
                "loss",
                *(state.global_step, -change, self.collapse_nats),
            )
        now = time.monotonic()
        if now - self.said >= self.every_s or state.global_step == state.max_steps:
            rate = (state.global_step - self.first_step) / (now - self.started)
            self.said = now
            log.info(
                "train: step %d/%d, loss %.4f, margin %.3f, accuracy %.2f, %.1f pairs/s, %.0f tokens/s, %.0f s left",
                *(state.global_step, state.max_steps, logs["loss"], logs["rewards/margins"]),
                *(
                    logs["rewards/accuracies"],
                    rate * pairs_per_step(args),
                    logs.get("throughput/tokens_per_second", math.nan),
                    (state.max_steps - state.global_step) / rate,
                ),
            )


def pairs_per_step(args: DPOConfig) -> int:
    """The global batch: pairs per optimizer step over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def write_log(history: list[dict], path: Path) -> None:
    """The trainer's history as CSV, one row a step; no times, so the same run writes the same bytes."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([column.replace("/", "_") for column in LOG_COLUMNS])
        for entry in history:
            if "loss" in entry:
                writer.writerow([f"{entry.get(column, math.nan):.8g}" for column in LOG_COLUMNS])
