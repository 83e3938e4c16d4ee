"""What every Trainer here does alike, whichever library it comes from: what it is told, what it saves to go on from, a
stop at a gradient that is not finite, and a line every few seconds."""

import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from rlaifv.params import TrainParams


def trainer_settings(params: TrainParams, folder: Path, seed: int) -> dict[str, Any]:
    """Arguments of a Trainer that writes what it goes on from into `folder`, but for the sizes of its batches."""
    return {
        "output_dir": str(folder),
        "learning_rate": params.learning_rate,
        "lr_scheduler_type": params.scheduler,
        "warmup_steps": params.warmup_ratio,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # `checkpoints.WriteCheckpoints` says when
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
    }


class Habits:
    """Comes before the library's Trainer among the bases of one of ours."""

    section = "train"  # of the parameters that messages name

    def trained_on(self) -> tuple[str, str]:
        """What a message about a step says that it was trained on, and to look at."""
        return "", ""

    def went_wrong(self, what: str) -> str:
        rows, look = self.trained_on()
        return (
            f"{what} at step {self.state.global_step + 1}{rows}: training stops and keeps the checkpoints before it; "
            f"{look}lower {self.section}.learning_rate or use train.dtype float32"
        )

    def _get_grad_norm(self, model, grad_norm=None):
        # private in transformers, but the only place between the gradient's norm and the optimizer's step
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise FloatingPointError(self.went_wrong(f"the gradient norm is {norm}"))
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What a run goes on from: the weights that learn, by the names that they have here. (transformers 5.23 saves
        a LLaVA by its names on the hub, which its Trainer does not find again: it goes on from the base model's
        weights, with a warning.) FSDP and DeepSpeed save theirs with the optimizer's."""
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                learned = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
                save_file(learned, Path(output_dir) / "model.safetensors")

    def _issue_warnings_after_load(self, load_result) -> None:
        """None: weights that a checkpoint lacks do not learn, and are as they were loaded."""

    def create_model_card(self, *args, **kwargs) -> None:
        """None: TRL writes one beside everything that a run can go on from."""


class Line(ABC, TrainerCallback):
    """One line every few seconds, and one for the last step."""

    key: str
    """What the log entries hold that the line is about."""

    @abstractmethod
    def say(self, state, logs: dict[str, float], rate: float) -> None:
        """Log the line; `rate` is in steps a second."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.said = time.monotonic()
        self.first_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        now = time.monotonic()
        if not state.is_world_process_zero or self.key not in (logs or {}):
            return
        if now - self.said >= 5.0 or state.global_step == state.max_steps:
            self.said = now
            self.say(state, logs, (state.global_step - self.first_step) / (now - self.started))
