"""Write trained checkpoints that load with `from_pretrained` and nothing else, LoRA merged in, byte for byte the same.

python -m rlaifv.training.checkpoints POLICY ADAPTER OUT    # merge a LoRA adapter into its base model
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback

from rlaifv.params import TrainParams
from rlaifv.training.dev_scores import Dev, score_checkpoint, surplus
from rlaifv.training.library_quirks import whole_models
from rlaifv.training.run_folder import read_whole, record_whole, remove
from rlaifv.vlm.loading import VLM, load_vlm


def checkpoints(params: TrainParams) -> list[str]:
    """The parts of a run's folder that are checkpoint 1 to n."""
    return [f"published/checkpoint-{k}" for k in range(1, params.epochs * params.checkpoints_per_epoch + 1)]


def published(params: TrainParams) -> list[str]:
    """The parts of a run's folder that every finished run has published: checkpoint 1 to n, or where only the best are
    kept their rows on dev, and the log."""
    kept = ".json" if params.keep_checkpoints else ""
    return [*(part + kept for part in checkpoints(params)), "published/log.csv"]


class WriteCheckpoints(TrainerCallback):
    """Writes checkpoint k after k/n of all steps, and after every `resume_every`-th lets the Trainer write one that it
    can go on from.

    `trainer` trains a policy, or a `dpo.PairScorer` that holds one; `vlm` and `policy` are the model that training
    began with and its path. With `dev` a checkpoint is scored at once. Weights that are not among the best go only when
    a state is saved: what a killed run would train again decides about none of them.
    """

    def __init__(self, trainer: Trainer, vlm: VLM, params: TrainParams, run: Path, policy: str, dev: Dev | None = None):
        self.trainer, self.vlm, self.params, self.run, self.policy = trainer, vlm, params, run, policy
        self.dev = dev

    def on_step_end(self, args, state, control, **kwargs):
        parts, control.should_save = checkpoints(self.params), False
        for k, part in enumerate(parts, start=1):
            if max(1, round(k * state.max_steps / len(parts))) == state.global_step:
                self._write(part)
                if self.dev:
                    with whole_models(self.trainer):
                        score_checkpoint(self.run, part, self.dev)
                control.should_save = k % self.params.resume_every == 0
        return control

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()  # each process writes a part of it
        if state.is_world_process_zero:
            now = f"trainer/checkpoint-{state.global_step}"
            earlier = [part for part in read_whole(self.run) if part.startswith("trainer/") and part != now]
            record_whole(self.run, now, instead_of=[*earlier, *self.surplus()])

    def surplus(self) -> list[str]:
        """Checkpoints that are not kept."""
        return surplus(self.run, self.dev, self.params.keep_checkpoints) if self.dev else []

    def _write(self, part: str) -> None:
        trainer, params, out = self.trainer, self.params, self.run / part
        # every process takes part: the weights may be spread over all of them
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if not trainer.accelerator.is_main_process:
            return
        own = {name.removeprefix("policy."): w for name, w in weights.items() if not name.startswith("reward_head.")}
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model = getattr(model, "policy", model)
        if params.lora_r:
            remove(self.run / "adapter")
            model.save_pretrained(self.run / "adapter", state_dict=own)
            with whole_models(trainer):
                merge(self.policy, self.run / "adapter", out, params.dtype)
        else:
            write_checkpoint(model, self.vlm.processor or self.vlm.tokenizer, out, params.dtype, own)
        self.complete(out, weights)
        record_whole(self.run, part)

    def complete(self, out: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write what else belongs to the checkpoint `out`; `weights` are all that the trainer's module has."""


def write_checkpoint(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    out: Path,
    dtype: str,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write `out` atomically: weights as safetensors in `dtype`, config, generation config, processor, tokenizer.

    `state_dict` stands in for the model's own weights where they are sharded over processes.
    """
    target, cast = getattr(torch, dtype), {}
    weights = {}
    for name, tensor in (state_dict or model.state_dict()).items():
        # tied weights stay one tensor, so that they are written once
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast:
            cast[key] = tensor.to(target) if tensor.is_floating_point() else tensor
        weights[name] = cast[key]
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    model.save_pretrained(partial, state_dict=weights)
    processor.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    config["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    remove(out)
    partial.rename(out)


def merge(policy: str, adapter: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Add a LoRA adapter to the weights of the model it was trained on and write the sum as a full checkpoint.

    The sum is made in float32 and rounded once, to `dtype`.
    """
    vlm = load_vlm(policy, dtype="float32", device="cpu", adapter=str(Path(adapter).resolve()))
    write_checkpoint(vlm.model, vlm.processor or vlm.tokenizer, out, dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Merge a LoRA adapter into its base model")
    parser.add_argument("policy", help="the model that the adapter was trained on: a folder or a hub id")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    merge(arguments.policy, arguments.adapter, arguments.out, arguments.dtype)
