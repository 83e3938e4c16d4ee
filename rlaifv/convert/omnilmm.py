"""OmniLMM's original layout (RLAIF-V-12B, OmniLMM-12B) ↔ a checkpoint of `rlaifv.vlm.omnilmm`.

The weights are the same but for the names of the language model's, so no number changes in either direction.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, AutoConfig, MistralConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlaifv.convert.layouts import Layout
from rlaifv.convert.llava import save_generation
from rlaifv.convert.weights import all_tensors, shards, tensors, write_shards
from rlaifv.records import write_atomic
from rlaifv.vlm.omnilmm import (
    OmniLMMConfig,
    OmniLMMForConditionalGeneration,
    OmniLMMImageProcessor,
    OmniLMMProcessor,
    OmniLMMVisionConfig,
)
from rlaifv.vlm.omnilmm.processing import CHAT_TEMPLATE, IMAGE, IMAGE_END, IMAGE_START, SYSTEM

TOWER = "eva02_enormous_patch14_clip_224.laion2b_plus"
"""timm's name of the image encoder; the original builds it without looking at the name in its configuration."""

TOWER_HEADS = {1792: 16}
"""Attention heads of the image encoder by its width: they are in no file."""

TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps")
TEXT += ("sliding_window", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of the language model; in the original's configuration they stand beside all others."""

TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 2048,
    "padding_side": "left",
    "tokenizer_class": "LlamaTokenizer",
    "truncation_side": "left",
    "use_default_system_prompt": False,
}
"""What the original's tokenizer_config.json says beside the tokens and the chat template."""


def convert_omnilmm(layout: Layout, out: Path, *, heads: int | None = None) -> list[str]:
    """Write the checkpoint into the folder `out`; returns what a user should know of it, a line each.

    Args:
        layout: what `find_layout` found.
        out: a folder; files of weights that an earlier start left there are not written again.
        heads: attention heads of the image encoder, where its width does not tell them.

    Raises, in one line, FileNotFoundError for what is not there and ValueError for a checkpoint that is not like the
    released ones.
    """
    source = layout.base
    shapes = {new_name(name): tuple(tensor.shape) for name, tensor in all_tensors(source) if new_name(name)}
    original = json.loads((source / "config.json").read_text())
    config = read_config(original, shapes, heads, source)
    check_weights(config, shapes, source)
    tokenizer = read_tokenizer(source, rows=config.text_config.vocab_size)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(source, out, new_name)
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    OmniLMMProcessor(OmniLMMImageProcessor(size=size), tokenizer, config.image_seq_length).save_pretrained(out)
    left_out = save_generation(source, out)
    config.save_pretrained(out)  # last: a folder without it is no checkpoint
    vision = config.vision_config
    return [
        f"image encoder: {vision.num_hidden_layers} blocks of {vision.num_attention_heads} heads; images of "
        f"{vision.image_size} pixels, squashed to a square, in {config.image_seq_length} tokens",
        f"chats begin with: {SYSTEM}",
        left_out,
    ]


def restore_omnilmm(source: Path, out: Path) -> None:
    """Write the checkpoint in `source`, of `rlaifv.vlm.omnilmm`, into the folder `out` in the original layout."""
    config = AutoConfig.from_pretrained(source)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(source, out, old_name)
    write_tokenizer(source, out)
    if (source / "generation_config.json").is_file():
        write_atomic(out / "generation_config.json", (source / "generation_config.json").read_text())
    write_atomic(out / "config.json", json.dumps(original_config(config), indent=2) + "\n")


def new_name(name: str) -> str:
    """A weight's name here; "" for a table that old versions of transformers wrote and that is computed."""
    if name.endswith("rotary_emb.inv_freq"):
        return ""
    return re.sub(r"^model\.(embed_tokens|layers|norm)\b", r"model.language_model.\1", name)


def old_name(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1)


def write_weights(source: Path, out: Path, rename: Callable[[str], str]) -> None:
    """All weights of `source` under other names, in as many files as they are in there."""
    files = shards(source)
    parts = [(f"{number:05}-of-{len(files):05}", tensors(file)) for number, file in enumerate(files, start=1)]

    def renamed(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if rename(name):
            yield rename(name), tensor

    write_shards(parts, out, renamed)


def read_config(
    original: Mapping[str, Any], shapes: Mapping[str, tuple], heads: int | None, source: Path
) -> OmniLMMConfig:
    """Our configuration: the language model's from the original's, the sizes of the rest from the weights' shapes."""
    tower, resampler = "model.vision_tower.", "model.resampler."
    needed = [f"{tower}pos_embed", f"{tower}patch_embed.proj.weight", f"{tower}blocks.0.mlp.fc1.weight"]
    if missing := [name for name in [*needed, f"{resampler}query"] if name not in shapes]:
        raise ValueError(
            f"{source} lacks {missing[0]}: its image encoder is not in it, as it is in the released models"
        )
    _, positions, width = shapes[needed[0]]
    patch, size = shapes[needed[1]][-1], original.get("image_size")
    heads = heads or TOWER_HEADS.get(width)
    if heads is None:
        raise ValueError(
            f"{source}: its image encoder is {width} wide, so its attention heads are not known: give them (--heads)"
        )
    if not size or size % patch or width % heads:
        raise ValueError(f"{source}: {size} pixels in patches of {patch}, or {width} in {heads} heads, do not come out")
    if not original.get("mm_use_im_start_end") or original.get("rope_scaling"):
        raise ValueError(f"{source}/config.json: mm_use_im_start_end is not true, or rope_scaling is set: no OmniLMM")
    text = {name: original[name] for name in [*TEXT, "rope_theta"] if name in original}
    blocks = {name.split(".")[3] for name in shapes if name.startswith(f"{tower}blocks.")}
    return OmniLMMConfig(
        vision_config=OmniLMMVisionConfig(
            hidden_size=width,
            intermediate_size=shapes[needed[2]][0],
            num_hidden_layers=len(blocks),
            num_attention_heads=heads,
            patch_size=patch,
            image_size=size,
            position_grid=isqrt(positions - 1),
        ),
        text_config=MistralConfig(**text),
        image_seq_length=shapes[f"{resampler}query"][0],
        tie_word_embeddings=original.get("tie_word_embeddings", False),
        architectures=[OmniLMMForConditionalGeneration.__name__],
        dtype=original.get("torch_dtype"),
    )


def check_weights(config: OmniLMMConfig, shapes: Mapping[str, tuple], source: Path) -> None:
    """ValueError unless the weights are those of a model of this configuration, all of them and no other."""
    with torch.device("meta"):
        ours = OmniLMMForConditionalGeneration(config).state_dict()
    for name in sorted(ours.keys() | shapes.keys()):
        if name not in shapes:
            raise ValueError(f"{source} lacks the weight {old_name(name)}: fetch it again")
        if name not in ours:
            raise ValueError(f"{source} holds {old_name(name)}, which no released OmniLMM has")
        if shapes[name] != tuple(ours[name].shape):
            raise ValueError(
                f"{source}: {old_name(name)} is {shapes[name]}, by config.json it is {tuple(ours[name].shape)}"
            )


def read_tokenizer(source: Path, rows: int) -> PreTrainedTokenizerBase:
    """Zephyr's tokenizer with the places for an image, as its tokenizer.json says; `rows` of embeddings are there."""
    if not (source / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{source} holds no tokenizer.json: fetch it again")
    # LlamaTokenizer, which the files name, would put its own rules for spaces in the place of the file's
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.chat_template = None
    own = tokenizer.get_vocab()
    places = [AddedToken(token, special=True, normalized=False) for token in (IMAGE, IMAGE_START, IMAGE_END)]
    tokenizer.add_tokens([token for token in places if token.content not in own])
    for token, number in tokenizer.get_added_vocab().items():
        if number >= rows:
            raise ValueError(f"{source}: {token} is token {number} of {rows} that the weights have")
    return tokenizer


def write_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer as the original's transformers 4.35 reads it: merges as text, the chat template among the settings
    (ours, which writes the same chat)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
    whole["model"].pop("ignore_merges", None)  # is younger
    write_atomic(out / "tokenizer.json", json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in whole["added_tokens"]}
    named = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    settings = TOKENIZER | named | {"added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE}
    write_atomic(out / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def original_config(config: OmniLMMConfig) -> dict[str, Any]:
    """The original's configuration, the language model's fields beside all others."""
    text = config.text_config.to_dict()
    return {
        "architectures": ["OmniLMMForCausalLM"],
        "model_type": "omnilmm",
        **{name: text[name] for name in TEXT},
        "rope_theta": config.text_config.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "mm_vision_tower": TOWER,
        "mm_use_im_start_end": True,
        "use_mm_proj": True,
        "tune_clip": True,
        "image_size": config.vision_config.image_size,
        "num_query": config.image_seq_length,
    }
