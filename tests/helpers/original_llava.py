"""A random LLaVA of a few thousand parameters in the layout of the original code, made up here: what `rlaifv.convert`
reads where the golden checkpoints are absent."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

WORDS = ["▁A", "▁chat", "▁is", "▁it", "▁a", "▁the", "▁picture", "▁dog", "▁cat", "▁No", "▁Yes", "▁US", "ER"]
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "../clip",
    "mm_patch_merge_type": "flat",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TOWER = "model.vision_tower.vision_tower."


def pieces() -> list[str]:
    """A vocabulary of Llama's kind: special tokens, bytes, then what merges of characters can become."""
    found = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for word in WORDS for letter in word} | set("abcdefghijklmnopqrstuvwxyz.,:?'"))
    merged = dict.fromkeys(word[:n] for word in WORDS for n in range(2, len(word) + 1))
    return [*found, *merged, *letters]


def sentencepiece_model(byte_fallback: bool = True) -> bytes:
    """The vocabulary as SentencePiece writes it: protobuf messages."""

    def field(number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return varint(number << 3) + varint(content)
        return varint(number << 3 | 2) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        low = value & 127
        return bytes([low]) if value < 128 else bytes([low | 128]) + varint(value >> 7)

    names, kinds = pieces(), {0: 2, 1: 3, 2: 3}
    found = b""
    for number, name in enumerate(names):
        kind = kinds.get(number, 6 if number < 259 else 1)
        score = varint(2 << 3 | 5) + struct.pack("<f", min(0, 259 - number))
        found += field(1, field(1, name.encode()) + score + field(3, kind))
    return found + field(2, field(3, 2) + field(35, int(byte_fallback))) + field(3, field(3, 1) + field(4, 0))


def save_original(
    folder: Path, *, seed: int = 0, tower: bool = True, shards: int = 1, bin: bool = False, **config
) -> Path:
    """Write `folder`/checkpoint in the original layout, and its image encoder as `folder`/clip; returns the first.

    Args:
        tower: whether the image encoder is in the checkpoint's own files, too.
        shards: files of weights, with an index where there are several.
        bin: pickled files, as before safetensors.
        config: changes of `CONFIG`; without `mm_projector_type` (None) the projector is one linear layer.
    """
    torch.manual_seed(seed)
    config = CONFIG | {"vocab_size": len(pieces())} | config
    config = {key: value for key, value in config.items() if value is not None}
    text = {key: value for key, value in config.items() if not key.startswith(("mm_", "image_", "model_type", "torch"))}
    weights = dict(LlamaForCausalLM(LlamaConfig(**text, initializer_range=0.2)).state_dict())
    width, hidden = config["mm_hidden_size"], config["hidden_size"]
    layers = ((".0", width), (".2", hidden)) if config.get("mm_projector_type") == "mlp2x_gelu" else (("", width),)
    for layer, size in layers:
        weights[f"model.mm_projector{layer}.weight"] = torch.randn(hidden, size) / 4
        weights[f"model.mm_projector{layer}.bias"] = torch.randn(hidden) / 4
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            initializer_range=0.2,
        )
    )
    clip.config.save_pretrained(folder / "clip")
    seeing = {f"vision_model.{name.removeprefix('vision_model.')}": w for name, w in clip.state_dict().items()}
    save_file(seeing, folder / "clip" / "model.safetensors")
    if tower:
        weights |= {TOWER + name: weight for name, weight in seeing.items()}
    else:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4) + 1.0
    out = folder / "checkpoint"
    out.mkdir(parents=True)
    write_weights(out, {name: weight.bfloat16() for name, weight in weights.items()}, shards, bin)
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.model").write_bytes(sentencepiece_model())
    (out / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "model_max_length": 2048}))
    (out / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}))
    return out


def write_weights(out: Path, weights: dict[str, torch.Tensor], shards: int, bin: bool) -> None:
    stem, ending = ("pytorch_model", "bin") if bin else ("model", "safetensors")
    names = sorted(weights)
    groups = [names[k::shards] for k in range(shards)]
    parts = [f"-{k:05d}-of-{shards:05d}" for k in range(1, shards + 1)] if shards > 1 else [""]
    files = [f"{stem}{part}.{ending}" for part in parts]
    for file, group in zip(files, groups, strict=True):
        content = {name: weights[name].contiguous() for name in group}
        torch.save(content, out / file) if bin else save_file(content, out / file, metadata={"format": "pt"})
    if shards > 1:
        places = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        (out / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_adapter(out: Path, base: Path, *, names: str = "q_proj v_proj down_proj", r: int = 4, alpha: int = 2) -> Path:
    """Write a LoRA adapter for the layers of `base`, as PEFT's old files have it."""
    torch.manual_seed(9)
    out.mkdir(parents=True)
    from rlaifv.convert.weights import all_tensors

    content = {}
    for name, weight in all_tensors(base):
        if name.startswith("model.layers.") and name.removesuffix(".weight").endswith(tuple(names.split())):
            place = f"base_model.model.{name.removesuffix('.weight')}"
            content[f"{place}.lora_A.weight"] = torch.randn(r, weight.shape[1])
            content[f"{place}.lora_B.weight"] = torch.randn(weight.shape[0], r)
    torch.save(content, out / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none", "target_modules": names.split()}
    settings |= {"base_model_name_or_path": "../checkpoint", "fan_in_fan_out": False, "modules_to_save": None}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    return out
