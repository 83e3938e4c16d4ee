"""A published checkpoint in small: its configuration with few, narrow layers, its own processor files, random weights.

What a prompt, an image or a layout in memory depends on stays as published: vocabulary and special tokens, image and
patch sizes, merging, tiles, query heads per key head, which of the tower's layers are read, tied embeddings.
"""

import shutil
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from rlaifv.vlm.checkpoint import TEXT_FILES
from rlaifv.vlm.loading import read_config

LAYERS = 2
HEAD = 16
"""Width of a head of the language model, usually 128. All widths shrink with it, so that a vocabulary of 150,000 words,
which stays whole, is not minutes of work in bfloat16 on a CPU without units for it."""

TOWER_HEADS, TOWER_HEAD = 4, 16


def random_checkpoint(published: Path, out: Path, dtype: str, divides: bool = False) -> PreTrainedModel:
    """Write a small random checkpoint like the one whose files without weights are in `published`; the same each time.

    With `divides` its output layer is not tied to the embeddings, so that `teach_to_divide` can set the two apart.
    """
    config = shrink(read_config(published, str(published)))
    if divides:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    auto = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(out)
    for file in (file for pattern in TEXT_FILES for file in published.glob(pattern)):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    return model


def sees_images(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same architecture with `LAYERS` narrow layers, or as many as it reads features of."""
    whole = config.to_dict()
    vision, text = whole.get("vision_config"), whole.get("text_config", whole)
    deepstack = len(vision.get("deepstack_visual_indexes") or ()) if vision else 0
    shrink_text(text, max(LAYERS, deepstack))
    if vision:
        read = whole.get("vision_feature_layer", -1)
        deepest = max(abs(layer) for layer in (read if isinstance(read, list | tuple) else [read]))
        shrink_tower(vision, max(LAYERS, deepstack, deepest), text["hidden_size"])
    if "insert_layer_id" in whole:  # where MiniCPM-V merges patches, among the tower's layers
        whole["insert_layer_id"] = 0
    return type(config).from_dict(whole)


def shrink_text(text: dict, layers: int) -> None:
    """Narrow a language model's configuration in place, all widths by the same factor."""
    heads, keys = text["num_attention_heads"], text.get("num_key_value_heads") or text["num_attention_heads"]
    size = text.get("head_dim") or text["hidden_size"] // heads
    kept = 1 if keys < heads else 2  # key heads; as many query heads for each as published
    factor = kept * heads // keys * HEAD / (heads * size)
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if text.get(name):
            text[name] = max(8, 8 * round(text[name] * factor / 8))
    text |= {"num_attention_heads": kept * heads // keys, "num_key_value_heads": kept, "num_hidden_layers": layers}
    if text.get("head_dim"):
        text["head_dim"] = HEAD
    if kinds := text.get("layer_types"):  # one of each kind first
        text["layer_types"] = [*dict.fromkeys(kinds), *kinds][:layers]
    rope = text.get("rope_parameters") or {}
    if "mrope_section" in rope:
        rope["mrope_section"] = scaled(rope["mrope_section"], HEAD / size)


def shrink_tower(vision: dict, layers: int, text_width: int) -> None:
    """Narrow a vision tower's configuration in place; Qwen's name some of the same things otherwise."""
    width = "embed_dim" if "embed_dim" in vision else "hidden_size"
    factor = TOWER_HEADS * TOWER_HEAD / vision[width]
    values = {
        "num_hidden_layers": layers,
        "depth": layers,
        "num_attention_heads": TOWER_HEADS,
        "num_heads": TOWER_HEADS,
    }
    values |= {"out_hidden_size": text_width, "fullatt_block_indexes": [layers - 1]}
    values |= {"deepstack_visual_indexes": list(range(len(vision.get("deepstack_visual_indexes") or ())))}
    values |= {"hidden_size": text_width} if width == "embed_dim" else {}
    if vision.get("intermediate_size"):
        values["intermediate_size"] = max(8, 8 * round(vision["intermediate_size"] * factor / 8))
    vision |= {name: value for name, value in values.items() if name in vision}
    vision[width] = TOWER_HEADS * TOWER_HEAD


def scaled(section: list[int], factor: float) -> list[int]:
    """Shares of a smaller whole, whole numbers too, that add up to it."""
    ends = [round(end * factor) for end in accumulate(section)]
    return [b - a for a, b in pairwise([0, *ends])]


@torch.no_grad()
def teach_to_divide(model: PreTrainedModel, prompt: list[int], bullet: list[int], end: int) -> None:
    """Make a random model reply to anything with one bulleted word: `bullet`, a random token, `end`.

    That is a list of one claim, and of one question. Each step of it has a coordinate of its own, which the embedding
    of a token sets and the output row of its follower reads; a residual connection carries it past the layers.

    Args:
        prompt: ids of a prompt; only the last, behind which a reply begins, is used.
        bullet: ids of what a line of a list begins with, such as "- ".
    """
    embeddings, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    steps = [prompt[-1], *bullet]
    embeddings[:, : len(steps)] = outputs[:, : len(steps)] = 0
    embeddings[:, len(bullet)] = 10.0  # of any other token: the end comes next
    outputs[end, len(bullet)] = 4.0
    for axis, (token, follower) in enumerate(zip(steps, bullet, strict=False)):
        embeddings[token, : len(steps)] = 0
        embeddings[token, axis] = 10.0
        outputs[follower, axis] = 4.0
    embeddings[bullet[-1], : len(steps)] = -10.0  # anything else may follow
