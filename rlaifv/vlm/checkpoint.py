"""Which checkpoint a path means: a folder, a pointer to another one, or a repository of the hub, fetched once."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from rlaifv import ROOT
from rlaifv.fingerprint import LARGE
from rlaifv.fingerprint import digest as value_digest
from rlaifv.records import SETTINGS, ModelRecord, write_atomic
from rlaifv.store import SCRATCH

POINTER = "pointer.json"
"""A folder that holds this file stands for another checkpoint and how it is used: `{"path": ..., "revision": ...}`, and
of `ModelRecord.settings` what is set."""

TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
FILES = [*TEXT_FILES, "*.safetensors"]
"""What is fetched of a repository, and what a fingerprint covers."""

KNOWN = SCRATCH / "fingerprints"
"""Fingerprints of large checkpoints, each under what was seen of its files: `add_files`."""

COPIES = ["consolidated*.safetensors", "original/*"]
"""The same weights once more, in a layout that transformers does not read."""


def resolve_checkpoint(path: str, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The folder of a checkpoint: absolute, behind its `pointer.json`; of a hub id, its snapshot in the hub's cache.

    Of a hub id, `files` are fetched at `revision` (None: main) where the cache lacks them; offline
    (HF_HUB_OFFLINE=1), the cache is what there is.

    Raises:
        FileNotFoundError: `path` is neither a checkpoint's folder nor an `owner/name` that the hub gives out, said in
            one line with the way out.
    """
    return find_checkpoint(path, revision, files=files)[0]


def find_checkpoint(
    path: str, revision: str | None = None, settings: Mapping[str, Any] = {}, files: Sequence[str] = FILES
) -> tuple[Path, dict]:
    """`resolve_checkpoint`, and with which settings it is used: those given, then those of its `pointer.json`."""
    folder = Path(path) if Path(path).is_absolute() else ROOT / path
    if (folder / POINTER).is_file():
        pointer = json.loads((folder / POINTER).read_text())
        own = {name: pointer[name] for name in SETTINGS if name in pointer}
        return find_checkpoint(pointer["path"], pointer.get("revision"), own | dict(settings), files)
    return _folder(path, folder, revision, files), dict(settings)


def _folder(path: str, folder: Path, revision: str | None, files: Sequence[str]) -> Path:
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{path} is a folder but holds no config.json: it is not a checkpoint")
        return folder
    if path.count("/") != 1 or path.startswith((".", "/")) or (ROOT / path.split("/")[0]).is_dir():
        raise FileNotFoundError(f"no checkpoint at {path!r}: give a folder or a hub id such as owner/name")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=files, ignore_patterns=COPIES))
    except GatedRepoError:
        problem = "its owner must let you in: ask on its page, then set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "the hub has no such repository, or it is private and HF_TOKEN is not its reader's"
    except RevisionNotFoundError:
        problem = f"the hub has no revision {revision!r} of it"
    except (OSError, ValueError, HTTPError) as error:
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise FileNotFoundError(f"cannot load a model from {path!r}: {problem}")


def write_pointer(folder: Path, model: ModelRecord) -> None:
    """Make `folder` stand for a checkpoint elsewhere; the fingerprint ties what depends on it to its bytes."""
    pointer = {"path": model.path, "revision": model.revision, "fingerprint": model.fingerprint} | model.settings
    write_atomic(folder / POINTER, json.dumps(pointer) + "\n")


def fingerprint_checkpoint(path: str, revision: str | None = None, settings: Mapping[str, Any] = {}) -> str:
    """16 hex digits that change with any byte of a local checkpoint, or with the commit of a hub one, and with the
    settings it is used with."""
    folder, settings = find_checkpoint(path, revision, settings)
    digest = hashlib.blake2b(digest_size=8)
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    if folder.parent.name == "snapshots":  # the hub's cache names the folder after the commit, which ties all bytes
        digest.update(f"{folder.parents[1].name}@{folder.name}".encode())
        return digest.hexdigest()
    return add_files(digest, sorted(file for file in folder.iterdir() if any(map(file.match, FILES))))


def add_files(digest: "hashlib._Hash", files: Sequence[Path]) -> str:
    """The digest, in hex, once the files' names and bytes are added to it.

    Large files are read once: the result is remembered, and trusted for as long as each of them has the name, size,
    time of change and inode that it had then (what DVC trusts, too). A changed byte is seen unless all of these are put
    back. Files that changed in the last two seconds are not remembered: a clock may not tell their next change apart.
    """
    seen = file_states(files)
    if sum(state[1] for state in seen) < LARGE:
        return read_files(digest, files)
    known = KNOWN / value_digest([digest.hexdigest(), seen])
    known.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{known}.lock"):  # the processes of a run ask at the same time: one of them reads
        if known.is_file():
            return known.read_text()
        found = read_files(digest, files)
        if file_states(files) == seen and time.time_ns() - max(state[2] for state in seen) > 2e9:
            write_atomic(known, found)
        return found


def file_states(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Name, bytes, time of change (ns) and inode of each file."""
    return [(file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for file in files for stat in [file.stat()]]


def read_files(digest: "hashlib._Hash", files: Sequence[Path]) -> str:
    """The digest, in hex, with all names and bytes, whatever is remembered of them."""
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
