"""The folder of a training run: what in it is whole, what a killed run goes on from, and what is published."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from rlaifv.fingerprint import files_below
from rlaifv.records import to_json, write_atomic
from rlaifv.store import FINISHED, link_or_copy, lock_folder

log = logging.getLogger(__name__)

WHOLE = "whole.json"
"""`{part: {file: [bytes, blake2b, ns of change]}}` of the parts that are complete, in the order in which they became
so. A part is a published checkpoint, its row on dev, the log, or what the Trainer goes on from; whatever is not listed
counts as half-written."""

Parts = dict[str, dict[str, list]]


def digests(part: Path, known: Mapping[str, list] = MappingProxyType({})) -> dict[str, list]:
    """Size, blake2b and time of change of a part's files by their path in it, each of them safely on disk before this
    returns. A file whose size and time are as in `known` is not read: its digest is taken from there."""
    found = {}
    for file in files_below(part):
        name, stat = file.relative_to(part.parent).as_posix(), file.stat()
        if name in known and known[name][::2] == [stat.st_size, stat.st_mtime_ns]:
            found[name] = known[name]
            continue
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        found[name] = [stat.st_size, digest, stat.st_mtime_ns]
    return found


def read_whole(run: Path) -> Parts:
    """The parts that were recorded as whole; none when the record cannot be read."""
    try:
        return json.loads((run / WHOLE).read_text())
    except (OSError, ValueError):
        return {}


def read_published(run: Path) -> Parts:
    """Those of them that are to be published: checkpoints, and the log of a finished run."""
    return {part: files for part, files in read_whole(run).items() if part.startswith("published/")}


def record_whole(run: Path, part: str, *, instead_of: Collection[str] = ()) -> None:
    """Record that `part` (a path in the run's folder) is complete, and drop what it is there `instead_of`."""
    parts = {name: files for name, files in read_whole(run).items() if name not in {part, *instead_of}}
    write_atomic(run / WHOLE, to_json({**parts, part: digests(run / part)}))
    for old in instead_of:
        remove(run / old)


def broken(run: Path, parts: Parts) -> str | None:
    """None when the files of all parts are there with the bytes that were recorded, else which one is not."""
    for name, files in parts.items():
        try:
            now = digests(run / name, files)
        except OSError:
            now = {}
        wrong = [key for key in now.keys() | files.keys() if now.get(key, [])[:2] != files.get(key, [])[:2]]
        if wrong:
            return f"{min(wrong)} is not as it was written"
    return None


def go_on_from(run: Path) -> Path | None:
    """The newest state of the Trainer that is whole, with all that was published before it; the rest is removed.

    None, and an empty folder, where there is none: the run starts anew. A line says what is broken.
    """
    whole, kept, found = {}, {}, None
    for name, files in read_whole(run).items():
        if problem := broken(run, {name: files}):
            log.warning("train: not resuming from %s: %s", name, problem)
            break
        whole[name] = files
        if name.startswith("trainer/"):
            kept, found = dict(whole), run / name
    if found is None and any((run / "trainer").glob("*")):
        log.warning("train: nothing whole to resume from in %s: starting anew", run)
    write_atomic(run / WHOLE, to_json(kept))
    for path in [*(run / "trainer").glob("*"), *(run / "published").glob("*")]:
        if path.relative_to(run).as_posix() not in kept:
            remove(path)
    return found


def read_finished(run: Path, promised: Collection[str]) -> dict | None:
    """What a run that has the `promised` parts, all whole, said when it finished; None for an unfinished run.

    A finished run with a broken part is removed, saying so: nothing is left that it could go on from.
    """
    if not (run / FINISHED).is_file():
        return None
    parts = read_published(run)
    problem = "a checkpoint is missing" if not set(promised) <= set(parts) else broken(run, parts)
    try:
        result = json.loads((run / FINISHED).read_text())
    except ValueError:
        problem = f"{FINISHED} cannot be read"
    if problem is None:
        return result
    log.warning("train: the finished run in %s is trained anew: %s", run, problem)
    for name in (FINISHED, WHOLE, "trainer", "published"):
        remove(run / name)
    return None


def carry_out(kind: str, run: Path, promised: Collection[str], out: Path, work: Callable[[], None]) -> dict:
    """Have `work` do what is left to do in a run's folder, under its lock, and publish it to `out`; returns what it
    said when it finished, of which the `promised` parts are whole. `job.train` says what that gives a user."""
    lock = lock_folder(run, kind)
    try:
        result = read_finished(run, promised)
        if result is None:
            work()
            result = read_finished(run, promised)
        if result is None:
            raise RuntimeError(f"training ended without all its checkpoints in {run}: call it again")
        publish(run, out)
        tidy_up(run)
    except FloatingPointError:
        publish(run, out, unfinished=True)
        raise
    finally:
        lock.release()
    return result


def publish(run: Path, out: Path, *, unfinished: bool = False) -> None:
    """Replace what `out` holds of an earlier run by what this one has published, hard-linked where that is possible.

    Raises RuntimeError, before anything in `out` changes, when one of them is not as it was written; of an unfinished
    run such a part is left out.
    """
    parts = read_published(run)
    if unfinished:
        parts = {name: files for name, files in parts.items() if not broken(run, {name: files})}
    if problem := broken(run, parts):
        raise RuntimeError(f"nothing is published from {run}: {problem}")
    out.mkdir(parents=True, exist_ok=True)
    new = out / "new.partial"
    remove(new)
    new.mkdir()
    for files in parts.values():
        for file in files:
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(run / "published" / file, new / file)
    for old in [*out.glob("checkpoint-*"), out / "log.csv"]:
        remove(old)
    for path in sorted(new.iterdir()):
        path.rename(out / path.name)
    new.rmdir()


def tidy_up(run: Path) -> None:
    """Remove what only an unfinished run needs."""
    for unfinished in ("trainer", "adapter", "pairs"):
        remove(run / unfinished)


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing happens where there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
