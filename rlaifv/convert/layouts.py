"""Which released layout a folder or hub repository is in, and where its parts lie."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaifv.vlm.checkpoint import TEXT_FILES, resolve_checkpoint

PARTS = {"policy": "rlhf_lora_adapter_model", "sft": None, "reward": "rm_lora_adapter_model"}
"""What LLaVA-RLHF releases in one repository: the folder of its adapter, which belongs to `sft_model` beside it."""

HEAD = "reward_head"
"""A reward model's last layer, beside its adapter."""

WEIGHTS = ("model*.safetensors", "adapter_model.safetensors"), ("pytorch_model*.bin", "adapter_model.bin")
"""What is fetched of a hub repository: the first kind, or the second where there is nothing of the first."""

BESIDE = ["non_lora_trainables.bin", f"{HEAD}*"]


@dataclass(frozen=True)
class Layout:
    """A checkpoint to convert. `name` is how it was given; `base` is a folder in the layout `kind` (llava or omnilmm),
    `adapter` the folder of a LoRA adapter that was trained on it."""

    name: str
    kind: str
    base: Path
    adapter: Path | None = None

    @property
    def folders(self) -> list[Path]:
        return [folder for folder in (self.base, self.adapter) if folder]

    @property
    def is_reward(self) -> bool:
        """Whether the adapter makes a reward model of it."""
        return self.adapter is not None and (self.adapter / HEAD).is_file()


def find_layout(source: str, revision: str | None = None, part: str = "policy", base: str | None = None) -> Layout:
    """What `source`, a folder or a hub id, holds; of a hub repository everything that is needed is fetched.

    `part` is a key of `PARTS`, for LLaVA-RLHF's repositories alone. `base` is what an adapter was trained on; None is
    `sft_model` beside it, or what its configuration names. Raises, in one line, FileNotFoundError for what is not
    there and ValueError for a layout that is not known.
    """
    folder = fetch(source, revision, [*TEXT_FILES, *BESIDE])
    if (folder / "adapter_config.json").is_file():
        found = Layout(source, "llava", base_of(folder, base, source), folder)
    elif (folder / "sft_model" / "config.json").is_file():
        adapter = PARTS[part] and folder / PARTS[part]
        if adapter and not adapter.is_dir():
            raise FileNotFoundError(f"{source} has no {PARTS[part]}: it does not hold the part {part!r}")
        found = Layout(source, "llava", folder / "sft_model", adapter)
    else:
        found = Layout(source, kind_of(folder, source), folder)
    if kind_of(found.base, str(found.base)) != found.kind:
        raise ValueError(f"{found.base} is not in LLaVA's original layout, which the adapter {source} was trained on")
    for place in found.folders:
        fetch_weights(place)
    return found


def kind_of(folder: Path, name: str) -> str:
    """The layout of a folder by its config.json."""
    config = read_config(folder, name)
    if config.get("model_type") == "omnilmm":
        return "omnilmm"
    if "text_config" in config or "mm_vision_tower" not in config:
        kind = config.get("model_type", "unknown")
        raise ValueError(f"{name} ({kind}) is in no layout that is converted: give it to the commands as it is")
    return "llava"


def read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except OSError:
        raise FileNotFoundError(f"{name} holds no config.json: it is not a checkpoint") from None
    except ValueError:
        raise ValueError(f"{name}/config.json is broken: fetch it again") from None


def base_of(adapter: Path, base: str | None, name: str) -> Path:
    """The folder of the model that an adapter was trained on."""
    if base is None and (adapter.parent / "sft_model" / "config.json").is_file():
        return adapter.parent / "sft_model"  # the configuration names the authors' own folder
    named = base or json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    try:
        return fetch(named, None, TEXT_FILES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the model that {name} was trained on: {error}; give it with --base") from None


def fetch(source: str, revision: str | None, files: Sequence[str]) -> Path:
    """A folder as it is, or those files of a hub repository."""
    here = Path(source).expanduser()
    return here.resolve() if here.is_dir() else resolve_checkpoint(source, revision, files=files)


def fetch_weights(folder: Path) -> None:
    """Fetch the weights that belong into a folder of the hub's cache; nothing for any other folder."""
    snapshot = next((place for place in (folder, *folder.parents) if place.parent.name == "snapshots"), None)
    if snapshot is None:
        return
    inside = "" if folder == snapshot else f"{folder.relative_to(snapshot)}/"
    repository = snapshot.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    for patterns in WEIGHTS:
        resolve_checkpoint(repository, snapshot.name, files=[inside + pattern for pattern in patterns])
        if any(file for pattern in patterns for file in folder.glob(pattern)):
            return
