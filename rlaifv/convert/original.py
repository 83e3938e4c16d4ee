"""The way back: a checkpoint of LLaVA-1.5, trained here or not, in the original layout, for the original code.

A converted checkpoint remembers the layout that it came from in its folder `original_layout`: the small files as they
were, the names, types and shapes of the weights in each file, and tables that are computed today. With it every
weight that nobody has trained comes back as it was.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from rlaifv.convert.weights import all_tensors, tensors, write_file, write_shards
from rlaifv.records import write_atomic
from rlaifv.vlm.checkpoint import TEXT_FILES

ORIGINAL = "original_layout"
LAYOUT = "layout.json"
TABLES = "tables.safetensors"

COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Tables that old versions of transformers saved beside the weights."""

TOWER = "model.vision_tower.vision_tower.vision_model."

NAMES = (
    (r"(?:language_model\.)?lm_head\.weight", "lm_head.weight"),
    (r"language_model\.(?:model\.)?(embed_tokens\.weight|norm\.weight|layers\..+)", r"model.\1"),
    (r"vision_tower\.(?:vision_model\.)?(.+)", rf"{TOWER}\1"),
    (r"multi_modal_projector\.linear_1\.(weight|bias)", r"model.mm_projector.0.\1"),
    (r"multi_modal_projector\.linear_2\.(weight|bias)", r"model.mm_projector.2.\1"),
)
"""What transformers calls the weights of a Llava, without a `model.` in front, and what the original does."""

Weights = Iterable[tuple[str, torch.Tensor]]


def remember(base: Path, config: Mapping[str, Any], files: Iterable[Weights], out: Path) -> None:
    """Write `original_layout` into the folder `out` of what was converted from `base`.

    Args:
        base: the folder of the release.
        config: its configuration, which an adapter's folder may have brought.
        files: the weights of each of its files.
    """
    folder = out / ORIGINAL
    folder.mkdir(exist_ok=True)
    for file in sorted(file for file in base.iterdir() if any(map(file.match, TEXT_FILES))):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    layout, tables = [], {}
    for weights in files:
        layout.append({})
        for name, weight in weights:
            layout[-1][name] = [str(weight.dtype).removeprefix("torch."), list(weight.shape)]
            if COMPUTED.fullmatch(name):
                tables[name] = weight
    write_file(tables, folder / TABLES)
    write_atomic(folder / LAYOUT, json.dumps([names for names in layout if names], indent=1) + "\n")


def memory_of(checkpoint: Path, like: Path | None, name: str) -> Path:
    """The `original_layout` of a checkpoint, or of `like`; FileNotFoundError where there is none, with the way out."""
    for folder in (like, checkpoint):
        if folder and (folder / ORIGINAL / LAYOUT).is_file():
            return folder / ORIGINAL
    raise FileNotFoundError(
        f"{like or name} does not remember an original layout: give the converted checkpoint that training began with "
        "with --like"
    )


def to_original(checkpoint: Path, memory: Path, out: Path, name: str) -> list[str]:
    """Write a Llava of transformers' into the folder `out` in the original layout; returns what a user should know.

    Args:
        checkpoint: the folder of the Llava, named `name` in messages.
        memory: the folder `original_layout` of the checkpoint itself, or of one of the same sizes.

    Raises ValueError, in one line, for a checkpoint that does not fit the layout.
    """
    layout, tables = json.loads((memory / LAYOUT).read_text()), dict(tensors(memory / TABLES))
    ours = {original_name(own, name): weight for own, weight in all_tensors(checkpoint)}
    names = {known for file in layout for known in file}
    if "model.mm_projector.weight" in names:
        merge_projector(ours)
    if missing := sorted(names - ours.keys() - tables.keys()):
        raise ValueError(f"{name} lacks {', '.join(missing[:3])}, which the original layout has: give another --like")
    unused = ours.keys() - names
    if strange := sorted(known for known in unused if not known.startswith(TOWER)):
        raise ValueError(f"{name} holds {', '.join(strange[:3])}, which the original layout has not")
    places = {known: (getattr(torch, dtype), shape) for file in layout for known, (dtype, shape) in file.items()}
    for known, weight in ours.items():
        if known in places and fitted(weight, known, places[known][1]).shape != tuple(places[known][1]):
            raise ValueError(f"{name}: {known} is {tuple(weight.shape)}, in the original layout {places[known][1]}")
    for file in memory.iterdir():
        if file.name not in (LAYOUT, TABLES):
            shutil.copyfile(file, out / file.name)
    parts = [
        (f"{number:05d}-of-{len(layout):05d}", [(known, tables.get(known, ours.get(known))) for known in file])
        for number, file in enumerate(layout, start=1)
    ]
    write_shards(
        parts, out, lambda known, weight: [(known, fitted(weight, known, places[known][1]).to(places[known][0]))]
    )
    wider = {w.dtype for known, w in ours.items() if known in places and w.dtype.itemsize > places[known][0].itemsize}
    return [
        *(f"{dtype} weights are rounded to the released type".removeprefix("torch.") for dtype in wider),
        *(["the image encoder stays out, as in the release: the original fetches mm_vision_tower"] if unused else []),
    ]


def original_name(name: str, checkpoint: str) -> str:
    """What the original calls a weight of transformers' Llava; ValueError for one that it has not."""
    for pattern, known in NAMES:
        if found := re.fullmatch(pattern, name.removeprefix("model.")):
            return found.expand(known)
    raise ValueError(f"{checkpoint}: {name} is no weight of LLaVA-1.5")


def merge_projector(ours: dict[str, torch.Tensor]) -> None:
    """Make one linear layer of the two that stand for it (W₂(W₁x + b₁) + b₂), in float32 where training has changed the
    second, which was the identity."""
    first, second = ({kind: ours.pop(f"model.mm_projector.{k}.{kind}") for kind in ("weight", "bias")} for k in (0, 2))
    if not torch.equal(second["weight"], torch.eye(len(second["weight"]), dtype=second["weight"].dtype)):
        first["weight"], first["bias"] = (second["weight"].float() @ first[kind].float() for kind in ("weight", "bias"))
    ours |= {"model.mm_projector.weight": first["weight"], "model.mm_projector.bias": first["bias"] + second["bias"]}


def fitted(weight: torch.Tensor, name: str, shape: list[int]) -> torch.Tensor:
    """A table of the vocabulary without the rows that were added for `<image>` behind the original's."""
    return weight[: shape[0]] if name in ("model.embed_tokens.weight", "lm_head.weight") else weight
