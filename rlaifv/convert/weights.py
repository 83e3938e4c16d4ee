"""The weights of a checkpoint, a file at a time: names, sizes and tensors of safetensors and of .bin shards."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlaifv.records import write_atomic

INDEX = "model.safetensors.index.json"

KINDS = (("model.safetensors", INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""One file, or several and their index; safetensors where a folder holds the same weights twice."""

Change = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""What becomes of one weight: none, one or several under other names."""


def shards(folder: Path) -> list[Path]:
    """The files with a checkpoint's weights, in order of name.

    Raises FileNotFoundError in one line where there are none, or one of the index is missing.
    """
    for single, index in KINDS:
        if (folder / index).is_file():
            names = {Path(name).name for name in json.loads((folder / index).read_text())["weight_map"].values()}
        elif (folder / single).is_file():
            names = {single}
        else:
            continue
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} of its weights: fetch it again")
        return [folder / name for name in sorted(names)]
    raise FileNotFoundError(f"{folder} holds no weights (model.safetensors, pytorch_model.bin or shards of them)")


def tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a file, mapped into memory: what nobody looks at is not read.

    Nothing in a .bin file is run (`weights_only`). Raises ValueError in one line for a file that is broken or holds
    anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                yield from ((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
            return
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before PyTorch 1.6: not to be mapped
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).strip().splitlines()[0]}") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{file} holds something else than weights")
    yield from found.items()


def all_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of all of a checkpoint's files; ValueError for one that is there twice."""
    seen = set()
    for file in shards(folder):
        for name, tensor in tensors(file):
            if name in seen:
                raise ValueError(f"{folder} holds {name} twice")
            seen.add(name)
            yield name, tensor


def write_shards(parts: Iterable[tuple[str, Iterable[tuple[str, torch.Tensor]]]], out: Path, change: Change) -> None:
    """Write every part, a name such as `00001-of-00002` and its weights, as a safetensors file of `out`, and the index.

    One part is in memory at a time, of which the weights that do not change stay in the mapped file that they came
    from. A file that is there was finished by an earlier start. With a single part there is no index.
    """
    parts, places, size = list(parts), {}, 0
    for name, weights in parts:
        file = out / (f"model-{name}.safetensors" if len(parts) > 1 else "model.safetensors")
        if not file.is_file():
            write_file({new: tensor for old, weight in weights for new, tensor in change(old, weight)}, file)
        for written, tensor in tensors(file):
            places[written] = file.name
            size += tensor.nbytes
    if len(parts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_atomic(out / INDEX, json.dumps(index, indent=2) + "\n")


def write_file(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, partial, metadata={"format": "pt"})
    partial.replace(file)
