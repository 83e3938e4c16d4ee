"""Load a checkpoint with its processor and chat template, the same for generation, feedback, training and chat."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from rlaifv import ROOT
from rlaifv.records import ModelRecord
from rlaifv.vlm.checkpoint import fingerprint_checkpoint, resolve_checkpoint
from rlaifv.vlm.processors import load_processor


@dataclass(frozen=True)
class VLM:
    """A loaded model with everything that is needed to talk to it.

    `processor` is None for a text-only language model. `fingerprint` identifies weights, processor and chat
    template; every stored judgement or log-prob carries it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    name: str
    fingerprint: str
    eos_token_ids: list[int] = field(default_factory=list)

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model itself, also where PEFT has wrapped it (adapters stay in effect)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def sees_images(self) -> bool:
        return self.processor is not None


def load_vlm(
    path: str,
    *,
    revision: str | None = None,
    dtype: str | None = "float32",
    device: str = "auto",
    adapter: str | None = None,
    quantization: QuantizationConfigMixin | None = None,
    must_see: bool = False,
) -> VLM:
    """Load a checkpoint folder or hub id, with an optional LoRA adapter, ready for inference.

    A VLM is loaded with its processor, a plain language model with its tokenizer only. `device` is "auto" (all
    visible accelerators, else CPU), "cpu", "cuda" or "cuda:K"; `dtype` None is bfloat16 on an accelerator and float32
    on a CPU. `quantization` is how transformers should shrink the weights while it loads them. Only safetensors are
    read and no remote code runs. With `must_see`, a model without images is a ValueError before its weights are read.
    """
    folder = resolve_checkpoint(path, revision)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"cannot load a model from {path!r}: {first_line}") from None
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if must_see and not multimodal:
        raise ValueError(f"{path} is a {config.model_type} model that sees no images: give a vision-language model")
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    use_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    model = auto.from_pretrained(
        folder,
        dtype=getattr(torch, dtype or ("bfloat16" if use_cuda else "float32")),
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
        device_map=device_map_for(folder, device) if use_cuda else quantization and {"": "cpu"},
        quantization_config=quantization,
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.eval().requires_grad_(False)
    processor = load_processor(folder) if multimodal else None
    tokenizer = processor.tokenizer if processor else AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fingerprint = fingerprint_checkpoint(str(folder))
    if adapter is not None:
        fingerprint += "+" + fingerprint_checkpoint(adapter)
    return VLM(model, tokenizer, processor, path, fingerprint, end_token_ids(model, tokenizer))


def load_model(model: ModelRecord, folder: Path | None = None) -> VLM:
    """Load the model that plays a role in this run; `folder` is read in its place (a policy of an earlier iteration).

    Raises FileNotFoundError for a folder that is not there yet, ValueError when the checkpoint is not the one that the
    stage `models` found: what was computed with it before would be mixed with another model's.
    """
    if folder:
        if not folder.is_dir():
            raise FileNotFoundError(f"no checkpoint {folder.relative_to(ROOT)} yet: run the stages before (dvc repro)")
        return load_vlm(str(folder), dtype=model.dtype, device=model.device)
    vlm = load_vlm(model.path, revision=model.revision, dtype=model.dtype, device=model.device)
    if vlm.fingerprint != model.fingerprint:
        raise ValueError(f"{model.path} has changed since the stage models looked at it: run `dvc repro -f models`")
    return vlm


def device_map_for(folder: Path, device: str) -> int | str:
    """Where a model goes on accelerators: "auto" is the one with the most free memory where its safetensors take at
    most nine tenths of that (as stored, whatever dtype they are loaded in), else all of them."""
    if device != "auto":
        return 0 if device == "cuda" else device
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    roomiest = max(range(len(free)), key=free.__getitem__)
    return roomiest if size <= 0.9 * free[roomiest] else "auto"


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: those of the generation config and the tokenizer's end token."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]
