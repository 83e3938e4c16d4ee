"""Digests of values, files and source: what stored work is known by."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from rlaifv import ROOT


def digest(value: Any) -> str:
    """16 hex digits of a JSON-able value (dataclasses included)."""
    text = json.dumps(value, sort_keys=True, default=lambda v: dataclasses.asdict(v))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest_files(*paths: Path) -> str:
    """16 hex digits of the files' names and bytes; of a folder, those of every file below it. One that is missing
    counts by its name: the stage that needs it says so."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            state.update(file.name.encode() + b"\0" + (file.read_bytes() if file.is_file() else b""))
    return state.hexdigest()


def digest_modules(*names: str) -> str:
    """16 hex digits of source files below rlaifv/."""
    return digest_files(*(ROOT / "rlaifv" / name for name in names))
