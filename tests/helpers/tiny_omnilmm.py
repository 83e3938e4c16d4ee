"""A tiny random OmniLMM in the layout of the releases."""

import json
from pathlib import Path

import torch
from lookalikes import zephyr_tokenizer
from safetensors.torch import save_file

HEADS = 2
"""Of the image encoder; in no file."""

CONFIG = {
    "architectures": ["OmniLMMForCausalLM"],
    "model_type": "omnilmm",
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "mm_vision_tower": "eva02_enormous_patch14_clip_224.laion2b_plus",
    "mm_use_im_start_end": True,
    "use_mm_proj": True,
    "tune_clip": True,
    "image_size": 56,
    "num_query": 4,
}
WIDTH, INNER, BLOCKS, PATCH, GRID = 32, 48, 2, 14, 3


def random_weights(vocabulary: int) -> dict[str, torch.Tensor]:
    """Every weight by the original's name, the same each time, with no more bits than bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        spread = scale * torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return (512 * spread).round().clamp(-256, 256) / 512

    def around_one(size: int) -> torch.Tensor:
        return 1 + (16 * torch.randn(size, generator=generator)).round().clamp(-64, 64) / 128

    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    keys = width * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    text = {"embed_tokens.weight": random(vocabulary, width, scale=4), "norm.weight": around_one(width)}
    for n in range(CONFIG["num_hidden_layers"]):
        rows = {"self_attn.q_proj": width, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
        rows |= {"self_attn.o_proj": width, "mlp.gate_proj": inner, "mlp.up_proj": inner}
        text |= {f"layers.{n}.{name}.weight": random(count, width) for name, count in rows.items()}
        text[f"layers.{n}.mlp.down_proj.weight"] = random(width, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            text[f"layers.{n}.{name}.weight"] = around_one(width)

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": around_one(size), f"{name}.bias": random(size)}

    def linear(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": random(out, into), f"{name}.bias": random(out)}

    tower = {"cls_token": random(1, 1, WIDTH, scale=4), "pos_embed": random(1, 1 + GRID**2, WIDTH, scale=4)}
    tower |= {"patch_embed.proj.weight": random(WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": random(WIDTH)}
    for n in range(BLOCKS):
        block = {"attn.q_bias": random(WIDTH), "attn.v_bias": random(WIDTH)}
        block |= {"attn.qkv.weight": random(3 * WIDTH, WIDTH, scale=2), **linear("attn.proj", WIDTH, WIDTH)}
        block |= norm("norm1", WIDTH) | norm("norm2", WIDTH)
        block |= linear("mlp.fc1", INNER, WIDTH) | linear("mlp.fc2", WIDTH, INNER)
        tower |= {f"blocks.{n}.{name}": weight for name, weight in block.items()}
    tower |= norm("norm", WIDTH)
    queries = CONFIG["num_query"]
    resampler = {name: random(queries, width, scale=4) for name in ("query", "pos_embed")}
    resampler |= {"proj": random(width, width), "kv_proj.weight": random(width, WIDTH)}
    resampler |= {"attn.in_proj_weight": random(3 * width, width), "attn.in_proj_bias": random(3 * width)}
    resampler |= linear("attn.out_proj", width, width)
    resampler |= norm("ln_q", width) | norm("ln_kv", width) | norm("ln_post", width)
    parts = {"": text, "vision_tower.": tower, "resampler.": resampler}
    weights = {f"model.{part}{name}": weight for part, found in parts.items() for name, weight in found.items()}
    return weights | {"lm_head.weight": random(vocabulary, width, scale=2)}


def save_original(folder: Path) -> Path:
    """The folder as it is released: bfloat16 in two files of safetensors."""
    folder.mkdir(parents=True)
    tokenizer = zephyr_tokenizer()
    tokenizer.save_pretrained(folder)
    weights = {name: weight.bfloat16() for name, weight in random_weights(len(tokenizer)).items()}
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": len(tokenizer)}, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    )
    return folder
