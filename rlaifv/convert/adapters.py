"""A LoRA adapter as it was released, added to the weights of its model by hand: W + (alpha / r) · B · A.

PEFT would match the adapter's target names with layers of the image encoder as well (`q_proj` is a name of both).
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rlaifv.convert.weights import tensors

FILES = ("adapter_model.safetensors", "adapter_model.bin")
BESIDE = "non_lora_trainables.bin"
"""What was trained whole beside the adapter: the projector."""

NOTHING = {"use_dora": False, "use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None}
NOTHING |= {"bias": "none", "fan_in_fan_out": False, "peft_type": "LORA"}
"""The settings that would make the sum another one, as they must be."""

PLACE = re.compile(r"base_model\.model\.(model\.layers\.\d+\..+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """`pairs`: A [r, in] and B [out, r] for a weight of the language model; `whole`: weights that take the place of the
    model's. The names are those of the original layout."""

    scale: float = 0.0
    pairs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)

    def added(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight called `name` as the adapter makes it: a sum is computed and kept in float32."""
        if (pair := self.pairs.get(name)) is None:
            return self.whole.get(name, weight)
        return weight.float() + self.scale * (pair["B"].float() @ pair["A"].float())

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """ValueError for an adapter of a model with other weights than these."""
        for name, pair in self.pairs.items():
            own = (len(pair["B"]), pair["A"].shape[1]) if len(pair) == 2 else None
            if own is None or shapes.get(name) != own:
                there = f"is {tuple(shapes[name])}" if name in shapes else "has no such weight"
                found = "half of a pair" if own is None else own
                raise ValueError(f"the adapter is another model's: it has {found} for {name}, and the model {there}")


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder. ValueError in one line for one that is computed otherwise than in the first line of this
    file, or that changes more than the language model's layers; FileNotFoundError where its weights are missing."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    for key, value in NOTHING.items():
        if (found := settings.get(key, value)) != value and (found or value):
            raise ValueError(f"{folder}: the adapter has {key}: {found}, which is not added by hand")
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} holds no {' or '.join(FILES)}: fetch it again")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors(file):
        if not (place := PLACE.fullmatch(name)):
            raise ValueError(f"{file}: {name} is outside of the language model's layers, and is not added by hand")
        pairs.setdefault(f"{place[1]}.weight", {})[place[2]] = tensor
    whole = dict(tensors(folder / BESIDE)) if (folder / BESIDE).is_file() else {}
    whole = {name.removeprefix("base_model."): tensor for name, tensor in whole.items()}
    whole = {name.removeprefix("model.") if name.startswith("model.model.") else name: w for name, w in whole.items()}
    return Adapter(settings["lora_alpha"] / settings["r"], pairs, whole)
