"""LLaVA-1.5 in its original layout (RLAIF-V-7B, liuhaotian/llava-v1.5-*, LLaVA-RLHF) as transformers' Llava.

The layout: a Llama's config.json with `mm_…` keys, SentencePiece's tokenizer.model, and weights of a Llama with
`model.mm_projector` among them; the image encoder is there too, or to be had from `mm_vision_tower`.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from rlaifv.convert.adapters import Adapter, read_adapter
from rlaifv.convert.layouts import Layout, fetch, fetch_weights, read_config
from rlaifv.convert.original import COMPUTED, remember
from rlaifv.convert.tokens import chat_template, read_tokenizer
from rlaifv.convert.weights import all_tensors, shards, tensors, write_shards
from rlaifv.vlm.checkpoint import TEXT_FILES

TOWER = "model.vision_tower.vision_tower."
"""What the names of the image encoder's weights begin with where they are in the model's files."""

NAMES = (
    (r"lm_head\.weight", "language_model.lm_head.weight"),
    (r"model\.(embed_tokens\.weight|norm\.weight|layers\..+)", r"language_model.model.\1"),
    (r"model\.mm_projector\.(?:0\.)?(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    (rf"{re.escape(TOWER)}(vision_model\..+)", r"vision_tower.\1"),
)
"""The original's names of weights, and those of the hub's llava-hf checkpoints, which every transformers reads."""

EXPECTED: dict[str, tuple] = {
    "model_type": ("llava", "llava_llama"),
    "mm_projector_type": (None, "linear", "mlp2x_gelu"),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
    "image_aspect_ratio": (None, "square", "pad"),
    "mm_patch_merge_type": (None, "flat"),
    **dict.fromkeys(("mm_use_im_start_end", "mm_use_im_patch_token"), (None, False)),
    **dict.fromkeys(("mm_resampler_type", "image_grid_pinpoints", "quantization_config"), (None,)),
}
"""What is converted. LLaVA-1.6 (anyres), the first LLaVA (`<im_patch>`) and their relatives have other values."""

HARMLESS = ("mm_vision_tower", "mm_vision_select_layer", "mm_hidden_size", "mm_projector_lr", "mm_vision_tower_lr")
HARMLESS += ("image_crop_resolution", "image_split_resolution")
"""Other keys that begin with mm_ or image_: read below, or of training, or of anyres alone."""

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps")
OPTIONS = ("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "attention_bias")
OPTIONS += ("rope_theta", "rope_scaling", "bos_token_id", "eos_token_id", "tie_word_embeddings")
"""The Llama's keys: those that there must be, and those whose absence means transformers' default."""

OPENAI = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}
"""OpenAI's image encoders by the last part of their names, and the side of their images in pixels."""


def convert_llava(layout: Layout, out: Path, *, tower: str | None, dtype: str | None, system: str) -> list[str]:
    """Write the checkpoint into the folder `out`; returns what a user should know of it, a line each.

    Args:
        layout: what `find_layout` found; its adapter is added to the weights.
        out: a folder; files of weights that an earlier start left there are not written again.
        tower: folder or hub id of the image encoder, where the configuration names another place.
        dtype: of all weights. None: each weight as it was released, float32 where an adapter was added to it.
        system: the sentence that a chat begins with.

    Raises ValueError for what is not this layout, FileNotFoundError for what is missing; in one line that names it.
    """
    config = released_config(layout)
    adapter = read_adapter(layout.adapter) if layout.adapter else Adapter()
    released = {name: (tensor.shape, tensor.dtype) for name, tensor in all_tensors(layout.base)}
    adapter.check({name: shape for name, (shape, _) in released.items()})
    extra = {name: tensor for name, tensor in adapter.whole.items() if name not in released}
    names = {*released, *extra}
    for name in names:
        our_name(name, layout.name)  # what is not known stops here, before anything is written
    linear = "model.mm_projector.weight" in names
    if linear != (config.get("mm_projector_type") in (None, "linear")):
        kind = config.get("mm_projector_type")
        raise ValueError(f"{layout.name}: its mm_projector_type is {kind!r}, its weights are another projector's")
    place = tower or config["mm_vision_tower"]
    inside = any(name.startswith(TOWER) for name in names)
    encoder = find_tower(place, layout.base, with_weights=not inside)
    files = shards(layout.base)
    parts = [*map(tensors, files), *([extra.items()] if extra else []), *([] if inside else [tower_weights(encoder)])]
    numbered = [(f"{k:05d}-of-{len(parts):05d}", part) for k, part in enumerate(parts, start=1)]
    target = getattr(torch, dtype) if dtype else None
    ours = llava_config(config, tower_config(encoder, place, layout.name), linear)
    ours.dtype = target or (torch.float32 if adapter.pairs else released["model.embed_tokens.weight"][1])
    ours.save_pretrained(out)
    processor(layout.base, config, encoder, ours, system).save_pretrained(out)
    left_out = save_generation(layout.base, out)
    remember(layout.base, config, [*map(tensors, files), extra.items()], out)
    write_shards(numbered, out, partial(converted, source=layout.name, adapter=adapter, linear=linear, dtype=target))
    side, square = ours.vision_config.image_size, "padded" if config.get("image_aspect_ratio") == "pad" else "cut"
    return [
        f"image encoder: {'in the release’s files' if inside else place}, for images of {side} pixels, {square} to a "
        f"square; behind it {'one linear layer' if linear else 'two layers'}",
        f"{len(adapter.pairs)} weights with the adapter's sum, scale {adapter.scale:g}" if adapter.pairs else "",
        f"chats begin with: {system}",
        left_out,
    ]


def released_config(layout: Layout) -> dict[str, Any]:
    """The configuration of the release, an adapter's own before that of its model; ValueError names what is not known
    here."""
    config = read_config(layout.base, layout.name)
    if layout.adapter and (layout.adapter / "config.json").is_file():
        own = read_config(layout.adapter, layout.name)
        config = own if "mm_vision_tower" in own else config
    for key, known in EXPECTED.items():
        if config.get(key) not in known:
            expected = " or ".join(str(value) for value in known)
            raise ValueError(f"{layout.name}: {key} is {config.get(key)!r}; what is converted has {expected}")
    for key, value in config.items():
        if key.startswith(("mm_", "image_")) and key not in {*EXPECTED, *HARMLESS} and value:
            raise ValueError(f"{layout.name}: {key} is {value!r}, which LLaVA-1.5 has not")
    if missing := [key for key in (*SIZES, "mm_vision_tower", "mm_vision_select_layer") if config.get(key) is None]:
        raise ValueError(f"{layout.name}: its config.json has no {', '.join(missing)}")
    return config


def our_name(name: str, source: str) -> str | None:
    """What transformers' Llava calls a weight; None for what it computes. ValueError for a weight that LLaVA-1.5 has
    not."""
    if COMPUTED.fullmatch(name):
        return None
    for pattern, ours in NAMES:
        if found := re.fullmatch(pattern, name):
            return found.expand(ours)
    also = " (LLaVA-1.6, which the hub has converted: llava-hf)" if "image_newline" in name else ""
    raise ValueError(f"{source}: {name} is no weight of LLaVA-1.5{also}")


def converted(
    name: str, weight: torch.Tensor, *, source: str, adapter: Adapter, linear: bool, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What becomes of one weight of the release. Behind a linear projector comes the identity, which changes nothing:
    transformers' Llava has two layers."""
    if ours := our_name(name, source):
        weight = adapter.added(name, weight)
        weight = weight.to(dtype) if dtype else weight
        yield ours, weight
        if linear and name == "model.mm_projector.weight":
            yield "multi_modal_projector.linear_2.weight", torch.eye(len(weight), dtype=weight.dtype)
            yield "multi_modal_projector.linear_2.bias", torch.zeros(len(weight), dtype=weight.dtype)


def find_tower(place: str, base: Path, with_weights: bool) -> Path | None:
    """The folder of an image encoder: beside the model where its path is relative, or of the hub. None where its
    weights are not needed and its settings known without a file."""
    for folder in (base / place, Path(place).expanduser()):
        if (folder / "config.json").is_file():
            return folder.resolve()
    if not with_weights and Path(place).name in OPENAI:
        return None
    try:
        folder = fetch(place, None, TEXT_FILES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the image encoder (mm_vision_tower): {error}; give it with --tower") from None
    if with_weights:
        fetch_weights(folder)
    return folder


def tower_config(folder: Path | None, place: str, source: str) -> CLIPVisionConfig:
    """The settings of an image encoder."""
    if folder is None:
        return CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=OPENAI[Path(place).name],
            patch_size=14,
            projection_dim=768,
        )
    kind = read_config(folder, place).get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{source}: its image encoder {place} is a {kind}, what is converted has CLIP's")
    return CLIPVisionConfig.from_pretrained(folder)


def tower_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of an image encoder, of CLIP's two halves that which sees, as the original names them in its own
    files."""
    for name, weight in all_tensors(folder):
        if name.startswith("vision_model."):
            yield TOWER + name, weight


def llava_config(config: dict[str, Any], vision: CLIPVisionConfig, linear: bool) -> LlavaConfig:
    """transformers' configuration of a release. Image tokens have the id 0, and nothing is added to the vocabulary
    (`tokens.py`)."""
    text = {key: config[key] for key in (*SIZES, *OPTIONS) if config.get(key) is not None}
    whole = config.get("mm_vision_select_feature") == "cls_patch"
    patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        image_token_index=0,
        image_seq_length=patches + whole,
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_layer=config["mm_vision_select_layer"],
        vision_feature_select_strategy="full" if whole else "default",
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        architectures=["LlavaForConditionalGeneration"],
    )


def processor(base: Path, config: dict[str, Any], tower: Path | None, ours: LlavaConfig, system: str) -> LlavaProcessor:
    """Tokenizer, chat template and image processor of a release. Its images are padded to squares, with the mean color
    of the encoder's pictures, or cut to squares, as its configuration says."""
    file = tower / "preprocessor_config.json" if tower else None
    own = json.loads(file.read_text()) if file and file.is_file() else {}
    pad, side = config.get("image_aspect_ratio") == "pad", ours.vision_config.image_size
    looks = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": own.get("image_mean", OPENAI_CLIP_MEAN),
        "image_std": own.get("image_std", OPENAI_CLIP_STD),
    }
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(do_pad=True, **looks) if pad else CLIPImageProcessorPil(**looks),
        tokenizer=read_tokenizer(base),
        patch_size=ours.vision_config.patch_size,
        vision_feature_select_strategy=ours.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token, which "default" takes away again
        chat_template=chat_template(base, system),
    )


def save_generation(base: Path, out: Path) -> str:
    """Write the settings of generation, and say what of them is left out.

    A file that sets temperature or top_p and does not sample (Vicuna's descendants have one) is refused by
    transformers when it is saved again; the original's sampling scripts would take the values from it.
    """
    file = base / "generation_config.json"
    own = json.loads(file.read_text()) if file.is_file() else {}
    dull = ("_from_model_config", "transformers_version", "max_length", "bos_token_id", "eos_token_id", "pad_token_id")
    kept = {key: value for key, value in own.items() if key not in dull}
    sampling = ("temperature", "top_p", "top_k", "typical_p")
    lost = {} if own.get("do_sample") else {key: kept.pop(key) for key in sampling if key in kept}
    GenerationConfig(**kept, bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(out)
    values = ", ".join(f"{key} {value:g}" for key, value in (lost or kept).items() if isinstance(value, int | float))
    if not values:
        return "generation_config.json: nothing but the special tokens"
    return f"generation_config.json: {values}" + (
        ", left out: it does not sample, but the original's sampling scripts use them where they give no others"
        if lost
        else ", kept"
    )
