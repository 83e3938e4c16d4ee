"""What stored work is known by: digests of values, of files, and of what dvc.yaml says a stage depends on."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlaifv import ROOT
from rlaifv.params import read_yaml

PIPELINES = ("dvc.yaml", "experiments/dvc.yaml")

LARGE = 16 << 20
"""Bytes from which on a data file is known by size and time of change alone, as DVC knows it."""


def digest(value: Any) -> str:
    """16 hex digits of a JSON-able value (dataclasses included)."""
    text = json.dumps(value, sort_keys=True, default=lambda v: dataclasses.asdict(v))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def files_below(path: Path) -> list[Path]:
    """The file itself, or every file below a folder in a fixed order, without what Python leaves there."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def digest_files(*paths: Path, by_stat_from: float = math.inf) -> str:
    """16 hex digits of the files' names and bytes; of a folder, those of every file below it. One that is missing
    counts by its name: the stage that needs it says so.

    Files of at least `by_stat_from` bytes are known by size and time of change instead of their bytes: a digest that
    differs then only costs work that is done again.
    """
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        for file in files_below(path):
            content = b""
            if file.is_file() and (stat := file.stat()).st_size >= by_stat_from:
                content = f"{stat.st_size}/{stat.st_mtime_ns}".encode()
            elif file.is_file():
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "blake2b").digest()
            state.update(file.name.encode() + b"\0" + content)
    return state.hexdigest()


@cache
def stages() -> dict[str, dict[str, Any]]:
    """Every stage of the pipeline's files → its `deps`, `params` … as written there (`${…}` is not filled in)."""
    found = {}
    for file in PIPELINES:
        if (ROOT / file).is_file():
            for name, stage in read_yaml(ROOT / file)["stages"].items():
                found[name] = {"deps": [], "params": []} | stage.get("do", stage)
    return found


def stage_definition(name: str) -> dict[str, Any]:
    """An entry of `stages`; KeyError names the stage that no dvc.yaml has."""
    if name not in stages():
        raise KeyError(f"no stage {name!r} in {' or '.join(PIPELINES)}; there are: {', '.join(stages())}")
    return stages()[name]


def definition_of(stage: str, iteration: str) -> str:
    """What dvc.yaml calls a stage: "test", of iteration 0 "test_base"."""
    return f"{stage}_base" if iteration == "0" else stage


def pipeline(iterations: Sequence[str]) -> list[str]:
    """The names of all stages that `dvc repro` runs for these iterations, first to last: "world", "test_base", …"""
    stages = read_yaml(ROOT / PIPELINES[0])["stages"]
    looped = [name for name, entry in stages.items() if "foreach" in entry]
    before = [name for name, entry in stages.items() if name not in looped and not entry.get("frozen")]
    last = [name for name in before if list(stages).index(name) > list(stages).index(looped[-1])]
    order = [name for name in before if name not in last]
    return order + [f"{name}@{number}" for number in iterations for name in looped] + last


def place_of(stage: str, iteration: str, iterations: Sequence[str]) -> str:
    """Where a stage stands in the pipeline: "generate@1: stage 8 of 25"; "" for one that `dvc repro` does not run."""
    order = pipeline(iterations)
    label = definition_of(stage, iteration) if iteration in ("", "0") else f"{stage}@{iteration}"
    return f"{label}: stage {order.index(label) + 1} of {len(order)}" if label in order else ""


def stage_sources(name: str) -> str:
    """16 hex digits of the code that dvc.yaml says a stage runs through."""
    return digest_files(*(ROOT / dep for dep in stage_definition(name)["deps"] if dep.startswith("rlaifv/")))
