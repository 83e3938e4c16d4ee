"""What stored work is known by: digests of values, of files, and of what dvc.yaml says a stage depends on."""

import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlaifv import ROOT

PIPELINES = ("dvc.yaml", "experiments/dvc.yaml")

LARGE = 16 << 20
"""Bytes from which on a data file is known by its size and the time of its last change, as DVC knows it."""


def digest(value: Any) -> str:
    """16 hex digits of a JSON-able value (dataclasses included)."""
    text = json.dumps(value, sort_keys=True, default=lambda v: dataclasses.asdict(v))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def files_below(path: Path) -> list[Path]:
    """The file itself, or every file below a folder in a fixed order, without what Python leaves there."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def digest_files(*paths: Path) -> str:
    """16 hex digits of the files' names and bytes; of a folder, those of every file below it. One that is missing
    counts by its name: the stage that needs it says so."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        for file in files_below(path):
            content = b""
            if file.is_file():
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "blake2b").digest()
            state.update(file.name.encode() + b"\0" + content)
    return state.hexdigest()


def digest_data(*paths: Path, stat_only: bool = False) -> str:
    """16 hex digits of what lies in data files and folders. Large files, and all of them with `stat_only`, are known by
    size and time of change: a digest that differs only costs work that is done again."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        for file in files_below(path):
            stat = file.stat() if file.is_file() else None
            by_stat = stat and (stat_only or stat.st_size > LARGE)
            content = f"{stat.st_size}/{stat.st_mtime_ns}" if by_stat else digest_files(file)
            state.update(f"{file.name}\0{content}".encode())
    return state.hexdigest()


@cache
def stages() -> dict[str, dict[str, list[str]]]:
    """Every stage of the pipeline's files → its `deps` and `params` as written there (`${…}` is not filled in)."""
    found = {}
    for file in PIPELINES:
        if (ROOT / file).is_file():
            for name, stage in YAML(typ="safe", pure=True).load(ROOT / file)["stages"].items():
                stage = stage.get("do", stage)
                found[name] = {key: stage.get(key, []) for key in ("deps", "params")}
    return found


def stage_definition(name: str) -> dict[str, list[str]]:
    """`deps` and `params` of a stage; KeyError names the stage that no dvc.yaml has."""
    if name not in stages():
        raise KeyError(f"no stage {name!r} in {' or '.join(PIPELINES)}; there are: {', '.join(stages())}")
    return stages()[name]


def stage_sources(name: str) -> str:
    """16 hex digits of the code that dvc.yaml says a stage runs through."""
    return digest_files(*(ROOT / dep for dep in stage_definition(name)["deps"] if dep.startswith("rlaifv/")))
