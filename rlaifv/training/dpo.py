"""Direct preference optimization on packed pairs (RLAIF-V, arXiv 2405.17220, section 2.3), from a batch to the step.

In reading order: `PairCollator` makes a batch of pairs, `PairScorer` gives their answers' log-probs under a policy,
`reference_logps` those under the reference, `dpo_loss` compares the two, and `PairTrainer` takes the steps.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rlaifv.params import TrainParams
from rlaifv.store import progress
from rlaifv.training import library_quirks
from rlaifv.training.packed_pairs import PADDING, build_batch, packed_masks, packed_positions, segment_weights
from rlaifv.training.pair_data import PairData
from rlaifv.training.policy import computing, sharded
from rlaifv.training.trainer import Habits, Line, trainer_settings
from rlaifv.training.vision_features import ImageInputs, KeptFeatures

log = logging.getLogger(__name__)

LOGITS_AT_ONCE = 1 << 25
"""So many logits are in memory at a time (128 MiB in float32); those of more answer tokens are computed in parts, and
again in the backward pass."""


class PairCollator:
    """Turns numbers of pairs into a batch (`packed_pairs.build_batch`) with the `pairs` that it is made of and, for a
    segment weight other than 1, `weights` [2B, A] of its tokens."""

    def __init__(self, data: PairData, pad_token_id: int, *, packed: bool, segment_weight: float = 1.0):
        self.data, self.pad_token_id = data, pad_token_id
        self.packed, self.segment_weight = packed, segment_weight

    def __call__(self, numbers: list[int]) -> dict:
        pairs = [self.data.pairs[i] for i in numbers]
        batch = build_batch(pairs, self.pad_token_id, packed=self.packed) | {"pairs": list(numbers)}
        if self.segment_weight != 1.0:
            batch["weights"] = segment_weights(pairs, self.segment_weight)
        return batch


class PairScorer(torch.nn.Module):
    """A policy as a function from a batch of pairs to the log-probs of their answers' tokens.

    This is the module that the Trainer trains: DDP, FSDP and DeepSpeed do their work in a module's `__call__`, so that
    everything with weights happens in this one's. `images` says where image inputs come from.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, images: ImageInputs | KeptFeatures | None = None):
        super().__init__()
        self.policy, self.images = policy, images
        self._no_split_modules = library_quirks.classes_to_shard(policy)

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model itself, also where PEFT has put adapters into it."""
        return self.policy.get_base_model() if isinstance(self.policy, PeftModel) else self.policy

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """`logps`, `entropy`, `mean_logit` (nats) and `is_top1` of every answer token, [2B, A] each; 0 where
        `answer_mask` is. Only the hidden states that predict an answer token are projected onto the vocabulary."""
        rows, mask, network = batch["rows"], batch["answer_mask"], self.network
        backbone, branch = network.base_model, rows["branch"]
        with self.images.serve(backbone, rows["images"], branch.device) as image_inputs:
            inputs = {**rows["token_types"], **image_inputs}
            if rows["position_ids"] is None:
                inputs["attention_mask"] = (branch != PADDING).long()
            else:
                inputs["attention_mask"] = packed_masks(rows, network.get_decoder().config)
                inputs["position_ids"] = packed_positions(rows, backbone, image_inputs)
            hidden = backbone(input_ids=rows["input_ids"], **inputs, use_cache=False).last_hidden_state
        places = torch.cat(batch["places"])
        hidden = hidden.flatten(0, 1)[rows["predictors"].flatten()[places]]
        targets = batch["answers"].flatten()[places]
        part = max(1, LOGITS_AT_ONCE // network.config.get_text_config().vocab_size)
        if len(targets) <= part:
            scores = self._score_tokens(hidden, targets)
        else:
            pieces = zip(hidden.split(part), targets.split(part), strict=True)
            done = [checkpoint(self._score_tokens, *piece, use_reentrant=False) for piece in pieces]
            scores = {key: torch.cat([piece[key] for piece in done]) for key in done[0]}
        return {key: value.new_zeros(mask.shape).masked_scatter(mask, value) for key, value in scores.items()}

    def _score_tokens(self, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """From hidden states [T, H] to what `forward` says of the `targets` [T]; [T] each."""
        config = self.network.config.get_text_config()
        logits = self.network.get_output_embeddings()(hidden).float()
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        logps = logits.log_softmax(-1)
        with torch.no_grad():
            watched = {
                "entropy": -(logps.exp() * logps).sum(-1),
                "mean_logit": logits.mean(-1),
                "is_top1": logits.argmax(-1) == targets,
            }
        return {"logps": logps.gather(-1, targets[:, None])[:, 0], **watched}


def answer_logps(scores: dict[str, torch.Tensor], batch: dict) -> torch.Tensor:
    """log π(answer | image, question) in nats, [2, B]: chosen and rejected; tokens weighted where the batch says so."""
    logps = scores["logps"] * batch["weights"] if "weights" in batch else scores["logps"]
    return logps.sum(1).view(2, -1)


@torch.no_grad()
def reference_logps(
    scorer: PairScorer, collate: PairCollator, batch_size: int, device: torch.device, dtype: str
) -> np.ndarray:
    """`answer_logps` of all pairs under a policy that has not been trained yet, float32 [2, pairs].

    The longest pairs come first: rows of similar length need little padding, and a batch that is too large fails at
    once. Every process computes its share. Raises FloatingPointError, with pair ids, where one is not finite.
    """
    state, pairs = PartialState(), collate.data.pairs
    order = (-pairs.row_lengths).argsort(kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: list[tuple[int, list[float]]] = []
    for numbers in progress(batches[state.process_index :: state.num_processes], "reference log-probs"):
        batch = send_to_device(collate(numbers), device)
        with computing(dtype, device):
            found += zip(numbers, answer_logps(scorer(batch), batch).T.tolist(), strict=True)
    logps = np.array([both for _, both in sorted(gather_object(found))], np.float32).T
    if bad := [pair_id for pair_id, finite in zip(pairs.ids, np.isfinite(logps).all(0), strict=True) if not finite]:
        raise FloatingPointError(f"the reference log-probs of {len(bad)} pairs are not finite: {', '.join(bad[:5])}")
    return logps


def dpo_loss(
    loss_type: str, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, params: TrainParams
) -> torch.Tensor:
    """The loss of each pair, [B].

    `policy` and `reference` are `answer_logps` under them, [2, B] in nats; `lengths` [2, B] their tokens. DPO
    (arXiv 2305.18290, equation 7), RLAIF-V's loss, is

        L = -log σ(β (log π(y_w|x)/π_ref(y_w|x) - log π(y_l|x)/π_ref(y_l|x)))

    with the chosen answer y_w, the rejected y_l and the pair's image and question x. Raises ValueError for a name that
    is not in `rlaifv.params.LOSSES`.
    """
    beta, flipped = params.beta, params.label_smoothing  # the share of pairs labeled wrongly
    right = 1 - flipped
    chosen, rejected = policy - reference
    margin = beta * (chosen - rejected)
    per_token = chosen / lengths[0] - rejected / lengths[1]
    log_sigmoid, sigmoid = F.logsigmoid, torch.sigmoid
    match loss_type:
        case "sigmoid":  # DPO, arXiv 2305.18290, eq. 7
            return -log_sigmoid(margin)
        case "sigmoid_norm":  # DPO of log-probs per token: Tülu 3, arXiv 2411.15124, eq. 6
            return -log_sigmoid(beta * per_token)
        case "ipo":  # arXiv 2310.12036, eq. 17, of log-probs per token
            return (per_token - 1 / (2 * beta)) ** 2
        case "hinge":  # SLiC-HF, arXiv 2305.10425, on DPO's margin (RSO, arXiv 2309.06657)
            return torch.relu(1 - margin)
        case "robust":  # robust DPO, arXiv 2403.00409, eq. 12
            return -(right * log_sigmoid(margin) - flipped * log_sigmoid(-margin)) / (1 - 2 * flipped)
        case "exo_pair":  # EXO, arXiv 2402.00856, eq. 16
            win = sigmoid(margin) * (log_sigmoid(margin) - math.log(right))
            return win + sigmoid(-margin) * (log_sigmoid(-margin) - math.log(flipped))
        case "nca_pair":  # NCA, arXiv 2402.05369, eq. 11, for two answers
            both = log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)
            return -log_sigmoid(beta * chosen) - 0.5 * both
        case "bco_pair":  # BCO, arXiv 2404.04656, without its moving reward shift
            return -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected)
        case "sppo_hard":  # SPPO, arXiv 2405.00675, eq. 4.7, with P = 1 for the chosen answer
            return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
        case "apo_zero":  # APO, arXiv 2408.06266, eq. 7
            return 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)
        case "apo_down":  # APO, eq. 8
            return sigmoid(beta * chosen) + 1 - sigmoid(margin)
        case "aot" | "aot_unpaired":  # AOT, arXiv 2406.05882: quantiles of the batch are compared, not pairs
            paired = (policy[0] - policy[1], reference[0] - reference[1])
            better, worse = (chosen, rejected) if loss_type == "aot_unpaired" else paired
            delta = beta * (better.sort().values - worse.sort().values)
            return -right * log_sigmoid(delta) - flipped * log_sigmoid(-delta)
        case "discopop":  # DiscoPOP, arXiv 2406.08414, eq. 5, with its temperature 0.05
            mix = sigmoid(margin / 0.05)
            return -(1 - mix) * log_sigmoid(margin) + mix * torch.exp(-margin)
        case "sft":  # the negative log-likelihood of a chosen token, the batch's mean (RPO, arXiv 2404.19733)
            return (-policy[0].sum() / lengths[0].sum()).expand(policy.shape[1])
    raise ValueError(f"unknown loss {loss_type!r}")


def batch_loss(
    policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, params: TrainParams
) -> torch.Tensor:
    """The mean over the pairs of `params.loss_type`, weighted by `params.loss_weights` where it is several losses."""
    weights = params.loss_weights or [1.0] * len(params.loss_type)
    return sum(
        weight * dpo_loss(name, policy, reference, lengths, params).mean()
        for name, weight in zip(params.loss_type, weights, strict=True)
    )


class EpochOrder(Sampler[int]):
    """A new permutation of the pairs each epoch, from (seed, epoch) alone; the incomplete last batch is left out.

    The epoch is read off the trainer's step, so an interrupted epoch goes on in its own order, and every step sees
    the same pairs on any number of processes. Within a step the longest pairs come first, so that a micro-batch holds
    rows of similar length and little padding; which pairs make a step is left to chance.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, step: Callable[[], int]):
        if (n := len(lengths)) < batch_size:
            raise ValueError(f"{n} pairs do not fill one batch: set train.batch_size (now {batch_size}) to {n} or less")
        self.lengths = torch.tensor(lengths)
        self.batch_size, self.seed, self.step = batch_size, seed, step
        self.steps_per_epoch = n // batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        epoch = self.step() // self.steps_per_epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        steps = torch.randperm(len(self.lengths), generator=generator)[: len(self)].view(-1, self.batch_size)
        by_length = self.lengths[steps].argsort(dim=1, descending=True, stable=True)
        yield from steps.gather(1, by_length).flatten().tolist()


class StepTrainer(Habits, Trainer):
    """`transformers.Trainer` over pairs, whatever is learned from them: steps in `EpochOrder`, metrics that are means
    over what was trained, a stop with the pairs' ids at anything that is not finite, and no more saved than learns.

    A subclass says in `compute_loss` what the loss of a micro-batch is, and what of it `watch` adds up.
    """

    loss_is_scaled_for_ga = False  # our loss is a mean over the micro-batch: the Trainer divides it by their number

    def __init__(self, scorer: PairScorer, collate: PairCollator, params: TrainParams, args: TrainingArguments):
        pairs = collate.data.pairs
        super().__init__(scorer, args, data_collator=collate, train_dataset=range(len(pairs)))
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress())
        if self.is_fsdp_enabled and params.dtype == "bfloat16":
            library_quirks.gather_in_bfloat16(self)
        self.pairs, self.params = pairs, params
        self.now_training_on: list[str] = []
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}  # of each metric: the sum, still on the GPU, and the count
        self._new_tokens = self._tokens = 0
        self._last_log: tuple[float, int, int] | None = None  # time, step, tokens

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        return EpochOrder(
            self.pairs.row_lengths.tolist(), self.params.batch_size, self.args.seed, lambda: self.state.global_step
        )

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Called when the weights have just been spread, before a state is loaded: each process makes its own part of
        them float32, so that none ever holds the whole model in it (28 GB of a 7B)."""
        if self.is_fsdp_enabled and not self.params.lora_r:
            self.model.to(torch.float32)
        return super().create_scheduler(num_training_steps, optimizer)

    def score(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """What the scorer says of a batch, computed in `params.dtype`."""
        self.now_training_on = [self.pairs[i].pair_id for i in batch["pairs"]]
        with nullcontext() if self.is_deepspeed_enabled else computing(self.params.dtype, self.accelerator.device):
            return model(batch)

    def finite(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss itself; FloatingPointError with the pairs' ids where it is not finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(self.went_wrong(f"the loss is {loss.item()}"))
        return loss

    def watch(self, values: dict[str, torch.Tensor], tokens: int) -> None:
        """Add a micro-batch to what is logged: values of its pairs or tokens by name, and how many tokens it has."""
        for name, of_each in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + of_each.double().sum(), count + of_each.numel()
        self._new_tokens += tokens

    def metrics(self) -> dict[str, float]:
        """What was trained since the last call: means over all pairs or all answer tokens of all processes."""
        totals, counts = zip(*self._sums.values(), strict=True)
        here = [*torch.stack(totals).tolist(), *counts, self._new_tokens]
        here = torch.tensor(here, dtype=torch.float64, device=self.accelerator.device)
        *sums, tokens = self.accelerator.reduce(here, "sum").tolist()
        of_each = zip(self._sums, sums[: len(totals)], sums[len(totals) :], strict=True)
        means = {name: total / count for name, total, count in of_each}
        self._tokens += int(tokens)
        self._sums, self._new_tokens = {}, 0
        return means | {"num_tokens": self._tokens}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics, and what was trained per second (for TensorBoard; `write_log` leaves times out)."""
        if "loss" in logs:
            logs |= self.metrics()
            now, step = time.monotonic(), self.state.global_step
            if self._last_log is not None:
                then, before, tokens = self._last_log
                logs["throughput/pairs_per_second"] = (step - before) * self.params.batch_size / (now - then)
                logs["throughput/tokens_per_second"] = (self._tokens - tokens) / (now - then)
            self._last_log = (now, step, self._tokens)
        super().log(logs, start_time)

    def trained_on(self) -> tuple[str, str]:
        return f", pairs {', '.join(self.now_training_on)}", "look at these pairs, "


class PairTrainer(StepTrainer):
    """Steps of DPO. `reference` [2, pairs] is what `reference_logps` gave before training."""

    def __init__(
        self,
        scorer: PairScorer,
        collate: PairCollator,
        reference: np.ndarray,
        params: TrainParams,
        args: TrainingArguments,
    ):
        super().__init__(scorer, collate, params, args)
        self.add_callback(Watch(params.beta, params.collapse_nats))
        self.reference = torch.from_numpy(reference).to(self.accelerator.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        """The mean loss of a micro-batch; its metrics are added up for the next log entry."""
        params, batch = self.params, inputs
        scores = self.score(model, batch)
        policy, reference = answer_logps(scores, batch), self.reference[:, batch["pairs"]]
        lengths = batch["answer_mask"].sum(1).view(2, -1)
        loss = self.finite(batch_loss(policy, reference, lengths, params))
        with torch.no_grad():
            self._add_metrics(batch, scores, params.beta * (policy - reference), policy, lengths)
        return (loss, scores) if return_outputs else loss

    def _add_metrics(self, batch, scores, rewards, policy, lengths) -> None:
        """Add this micro-batch to the sums; `rewards` are DPO's β log π/π_ref, [2, B]."""
        chosen, rejected = batch["places"]
        of_tokens = {key: scores[key].flatten() for key in ("entropy", "is_top1", "mean_logit")}
        self.watch(
            {
                "rewards/chosen": rewards[0],
                "rewards/rejected": rewards[1],
                "rewards/accuracies": rewards[0] > rewards[1],
                "rewards/margins": rewards[0] - rewards[1],
                "logps/chosen": policy[0],
                "logps/rejected": policy[1],
                "length/chosen": lengths[0],
                "length/rejected": lengths[1],
                "entropy": of_tokens["entropy"][torch.cat([chosen, rejected])],
                "mean_token_accuracy": of_tokens["is_top1"][chosen],
                "logits/chosen": of_tokens["mean_logit"][chosen],
                "logits/rejected": of_tokens["mean_logit"][rejected],
            },
            batch["tokens"],
        )


class Progress(Line):
    key = "rewards/margins"

    def say(self, state, logs: dict[str, float], rate: float) -> None:
        log.info(
            "train: step %d/%d, loss %.4f, margin %.3f, accuracy %.2f, %.1f pairs/s, %.0f tokens/s, %.0f s left",
            *(state.global_step, state.max_steps, logs["loss"], logs["rewards/margins"]),
            *(logs["rewards/accuracies"], logs.get("throughput/pairs_per_second", math.nan)),
            *(logs.get("throughput/tokens_per_second", math.nan), (state.max_steps - state.global_step) / rate),
        )


class Watch(TrainerCallback):
    """A warning when chosen answers lose their likelihood.

    DPO only widens a margin: it can do so by pushing both answers down. `rewards/chosen` / (β · length) is the mean
    change of a chosen answer's log-prob per token, in nats.
    """

    def __init__(self, beta: float, collapse_nats: float):
        self.beta, self.collapse_nats = beta, collapse_nats
        self.recent: list[float] = []
        self.warned = False

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


def training_arguments(params: TrainParams, folder: Path, seed: int) -> TrainingArguments:
    """The Trainer's arguments for our parameters; `folder` is where it writes what it goes on from."""
    args = TrainingArguments(
        **trainer_settings(params, folder, seed),
        num_train_epochs=params.epochs,
        per_device_train_batch_size=params.micro_batch_size,
        gradient_accumulation_steps=params.batch_size // (params.micro_batch_size * params.processes),
        bf16=params.dtype == "bfloat16" and sharded() == "deepspeed",  # else `policy.computing` does it
        # FSDP would hold the gradients of the whole model until the last micro-batch of a step (28 GB of a 7B)
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": sharded() == "fsdp"}},
        report_to="tensorboard",
    )
    library_quirks.one_gpu_a_process(args)
    return args


LOG_COLUMNS = ("step", "epoch", "loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
LOG_COLUMNS += ("logps/chosen", "logps/rejected", "length/chosen", "length/rejected", "learning_rate", "grad_norm")
LOG_COLUMNS += ("entropy", "mean_token_accuracy")


def write_log(history: list[dict], path: Path) -> None:
    """The trainer's history as CSV, one row a step; no times, so the same run writes the same bytes. Raises
    FloatingPointError that names step and column of a number that is not finite."""
    history = [entry for entry in history if "loss" in entry]
    for entry, column in itertools.product(history, LOG_COLUMNS):
        if not math.isfinite(entry.get(column, 0)):
            raise FloatingPointError(f"step {entry['step']}: {column} is {entry[column]}, expected a finite number")
    steps = pd.DataFrame(history)
    steps = steps[[column for column in LOG_COLUMNS if column in steps]]
    steps = steps.rename(columns=lambda column: column.replace("/", "_"))
    steps.to_csv(path, index=False, float_format="%.8g", na_rep="nan", lineterminator="\n")
