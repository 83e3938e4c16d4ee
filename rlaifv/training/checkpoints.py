"""Write trained checkpoints that load with `from_pretrained` and nothing else, LoRA merged in, byte for byte the same.

python -m rlaifv.training.checkpoints POLICY ADAPTER OUT    # merge a LoRA adapter into its base model
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from rlaifv.vlm.loading import load_vlm


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
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    processor.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    config["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def write_adapter(model: PeftModel, out: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a LoRA adapter alone (what `merge` takes)."""
    weights = get_peft_model_state_dict(model, state_dict=state_dict)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out, state_dict=weights)


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
