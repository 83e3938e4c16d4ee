"""The policy as training needs it: loaded in the optimizer's dtype, frozen where it must not learn."""

import logging
import os
import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from rlaifv.params import TrainParams
from rlaifv.training import library_quirks
from rlaifv.training.vision_features import vision_tower
from rlaifv.vlm.loading import VLM, load_vlm

log = logging.getLogger(__name__)

PROJECTOR = ("projector", "merger", "connector", "aligner", "resampler", "image_newline")
"""Words in the names of the parameters between vision tower and language model, over all architectures."""


def load_policy(policy: str, params: TrainParams) -> VLM:
    """The policy in main memory, its weights in the dtype that the optimizer needs.

    Full fine-tuning in bfloat16 keeps float32 weights (steps of 5e-7 vanish in bfloat16's 8 bits) and computes in
    bfloat16. Loaded in bfloat16 are a frozen LoRA base, and a model that is spread over processes, so that each needs
    half the memory for the whole of it: of its own part each then has float32 weights (`dpo.PairTrainer`; DeepSpeed
    has its own).
    """
    dtype = params.dtype if params.lora_r or sharded() else "float32"
    if not params.load_in_4bit:
        return load_vlm(policy, dtype=dtype, device="cpu")
    vlm = load_vlm(policy, dtype=dtype, device=own_device(), load_in_4bit=True)
    library_quirks.keep_4bit_kernels_with_gradients(vlm.model)
    return vlm


def own_device() -> str:
    """This process's GPU, or "cpu" where there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def whole_device(model: PreTrainedModel) -> torch.device:
    """Where the whole model is before its weights are spread over GPUs, and its layout and reference log-probs are
    computed: this process's GPU, or the CPU where it does not fit."""
    if sharded() and torch.cuda.is_available():
        need = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        if need > 0.8 * torch.cuda.mem_get_info(own_device())[0]:
            log.warning("train: the whole model does not fit one GPU: layout and reference log-probs on the CPU (slow)")
            return torch.device("cpu")
    return torch.device(own_device())


def sharded() -> str | None:
    """What spreads the weights over the processes of this run, if anything: "deepspeed" or "fsdp"."""
    for name in ("deepspeed", "fsdp"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false") == "true":
            return name
    return None


def computing(dtype: str, device: torch.device) -> torch.autocast:
    """Within the block, matrices are multiplied in `dtype`. No copies of the weights are kept for that until its end:
    for a 7B model they are 13.5 GB."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False)


def freeze(model: PreTrainedModel, params: TrainParams) -> None:
    """Let only the language model learn, and the projector unless it is frozen; never the vision tower. No dropout:
    log-ratios would be noise (LoRA's own comes later)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if params.lora_r:
        return  # the adapters that PEFT adds are all that learns
    tower = {id(p) for p in vision_tower(model).parameters()} if vision_tower(model) is not None else set()
    for name, parameter in model.named_parameters():
        projector = any(word in name for word in PROJECTOR)
        parameter.requires_grad_(not params.freeze_projector if projector else id(parameter) not in tower)


def add_lora(model: PreTrainedModel, params: TrainParams) -> PeftModel:
    """The model with adapters in it that change nothing yet; they are all that learns."""
    float32 = library_quirks.adapters_in_float32()
    return get_peft_model(model, lora_config(model, params), autocast_adapter_dtype=float32)


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
