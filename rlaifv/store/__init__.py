"""The resumable store of every long stage: chunks of rows that survive a kill, published whole or not at all."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlaifv import ROOT
from rlaifv.fingerprint import digest
from rlaifv.params import ClusterParams
from rlaifv.records import Reject, T, to_json, write_atomic
from rlaifv.store.cluster import spread

log = logging.getLogger(__name__)

SCRATCH = ROOT / "scratch"
FINISHED = "finished.json"
"""Marks a folder of scratch whose work is published: `sweep` may delete it."""

Work = Callable[[T], tuple[Iterable[Any], Iterable[Reject]]]
"""Makes the rows and the rejects of one chunk."""


class TooManyRejects(RuntimeError):
    """More rows were rejected than `max_reject_rate` allows: the input or the model does not fit the stage."""


class IncompleteWork(RuntimeError):
    """What is to be published is not all of it: chunks are missing, or rows and rejects do not add up to the inputs."""


class InUse(RuntimeError):
    """Another process is at the same work."""


def lock_folder(folder: Path, what: str) -> FileLock:
    """Keep every other process out of a folder of scratch until the lock is released or this process ends.

    The lock lies beside the folder, so that the folder can be deleted while it is held. Raises InUse.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise InUse(f"{what}: another process is at this work in {folder}: wait for it or stop it") from None
    return lock


def sweep(scratch: Path, stage: str) -> None:
    """Delete finished work of other stages than `stage`, whose own finished work may be asked for once more: DVC has
    not taken its outputs yet when a run dies in the stage's last second. What is unfinished or in use stays."""
    for marker in scratch.glob(f"*/{FINISHED}"):
        if not marker.parent.name.startswith((f"{stage}-", f"{stage}@")):
            _delete(marker.parent)
    for trash in scratch.glob("trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Delete a folder that no process holds: out of sight at once, so that half of it is never taken for all of it."""
    with contextlib.suppress(InUse, FileNotFoundError):
        lock = lock_folder(folder, folder.name)
        try:
            trash = folder.rename(tempfile.mkdtemp(prefix="trash-", dir=folder.parent))
            shutil.rmtree(trash, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
        finally:
            lock.release()


class Store:
    """Work that survives `kill -9`: chunks of rows, each written atomically under a key of all that determines it.

    The key covers parameters, models, inputs and the stage's source, so work of another model or input is never taken
    up again. Chunk borders depend on the input alone; a killed chunk is done again whole, and so is one whose file is
    not as it was written, so that an interrupted run ends in the same bytes as an uninterrupted one. With
    `cluster.engine` "ray" the chunks are done by workers on several GPUs or machines, in the same bytes.
    """

    def __init__(
        self, stage: str, key: Mapping[str, Any], root: Path | None = None, cluster: ClusterParams | None = None
    ) -> None:
        self.stage, self.cluster = stage, cluster or ClusterParams()
        self.folder = (root or SCRATCH) / f"{stage}-{digest(key)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._chunks = 0
        self._lock: FileLock | None = None

    def run(self, chunks: Sequence[T], work: Work[T]) -> None:
        """Do the chunks that are not done yet. `work` is first called when there is one, so what it loads (a model) is
        loaded only then, and by whoever does a chunk. Raises InUse while another process is at the same work, and
        ClusterProblem."""
        self._lock = self._lock or lock_folder(self.folder, self.stage)
        try:
            self._chunks = len(chunks)
            todo = [i for i in range(len(chunks)) if self._read(i) is None]
            if len(todo) < len(chunks):
                done = len(chunks) - len(todo)
                log.info("%s: %d of %d chunks are done already, going on", self.stage, done, len(chunks))
            if todo and self.cluster.engine == "ray":
                do = partial(do_chunk, self.folder, work)
                numbers = spread(do, {i: chunks[i] for i in todo}, self.folder, self.cluster)
                for _ in progress(numbers, self.stage, len(todo)):
                    pass
            else:
                for i in progress(todo, self.stage):
                    do_chunk(self.folder, work, i, chunks[i])
        except BaseException:
            self._release()
            raise

    def keep(self, name: str, make: Callable[[], str]) -> str:
        """A text that belongs to the work (what a model said of itself), made once and kept with the chunks."""
        path = self.folder / name
        if not path.is_file():
            write_atomic(path, make(), shared=True)
        return path.read_text(encoding="utf-8")

    def publish(self, rows_path: Path, n_inputs: int, max_reject_rate: float, of: str | None = None) -> tuple[int, int]:
        """Put all chunks together as `rows_path` and `rejects.jsonl` beside it; return their row counts.

        Args:
            rows_path: the file of rows.
            n_inputs: inputs that `run` was given, each of which gave a row or a reject.
            max_reject_rate: the largest accepted share of rejects.
            of: the field of a row that names its input, where an input gives several rows; None: one row an input.

        Raises:
            IncompleteWork: a chunk is missing, or rows and rejects do not add up; nothing is published then.
            TooManyRejects: with the first reason, when rejects exceed `max_reject_rate` of `n_inputs`; the next run
                does the chunks that have any again.
        """
        try:
            parts = [self._read(i) for i in range(self._chunks)]
            if missing := [i for i, part in enumerate(parts) if part is None]:
                raise IncompleteWork(
                    f"{self.stage}: {len(missing)} of {self._chunks} chunks are gone from {self.folder}, first number "
                    f"{missing[0]}: run the stage again, it makes them anew"
                )
            rows = [row for part in parts for row in part[0]]
            rejects = [reject for part in parts for reject in part[1]]
            answered = len(rows) if of is None else len({json.loads(row)[of] for row in rows})
            if answered + len(rejects) != n_inputs:
                raise IncompleteWork(
                    f"{self.stage}: {answered} inputs with rows and {len(rejects)} rejects are not the {n_inputs} "
                    f"inputs: an input is lost or there twice; delete {self.folder} and run the stage again"
                )
            try:
                check_rejects(self.stage, [Reject(**json.loads(r)) for r in rejects], n_inputs, max_reject_rate)
            except TooManyRejects:
                for index, part in enumerate(parts):
                    if part[1]:  # what spoiled them (a disk, a GPU) may be mended when the stage is run again
                        chunk_file(self.folder, index).unlink()
                raise
            write_atomic(rows_path.parent / "rejects.jsonl", "".join(row + "\n" for row in rejects))
            write_atomic(rows_path, "".join(row + "\n" for row in rows))
            write_atomic(self.folder / FINISHED, to_json({"rows": len(rows), "rejects": len(rejects)}) + "\n")
        finally:
            self._release()
        for marker in self.folder.parent.glob(f"{self.stage}-*/{FINISHED}"):  # what is unfinished may be gone on with
            if marker.parent != self.folder:
                _delete(marker.parent)
        return len(rows), len(rejects)

    def _release(self) -> None:
        if self._lock:
            self._lock.release(force=True)
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None}  # a worker's copy: the driver holds the lock

    def _read(self, index: int) -> tuple[list[str], list[str]] | None:
        """A chunk's rows and rejects as JSON, None where it is not done; one that is not as written is not done."""
        path = chunk_file(self.folder, index)
        if not path.exists():
            return None
        body, found, end = path.read_bytes().decode("utf-8", errors="replace").rpartition("end ")
        if not found or end != f"{_checksum(body)}\n":
            log.warning("%s: chunk %d is broken (%s is cut or was changed): it is made again", self.stage, index, path)
            path.unlink()
            return None
        lines = [line.partition(" ") for line in body.split("\n")[:-1]]  # splitlines also splits at U+0085
        return [row for kind, _, row in lines if kind == "row"], [row for kind, _, row in lines if kind == "reject"]


def chunk_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.jsonl"


def do_chunk(folder: Path, work: Work[T], index: int, chunk: T) -> None:
    """Do one chunk and write its file."""
    rows, rejects = work(chunk)
    body = "".join([f"row {to_json(row)}\n" for row in rows] + [f"reject {to_json(reject)}\n" for reject in rejects])
    write_atomic(chunk_file(folder, index), f"{body}end {_checksum(body)}\n", shared=True)


def _checksum(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=16).hexdigest()


def check_rejects(stage: str, rejects: Sequence[Reject], n_inputs: int, max_reject_rate: float) -> None:
    if len(rejects) > max_reject_rate * n_inputs:
        raise TooManyRejects(
            f"{stage}: {len(rejects)} of {n_inputs} rows rejected, more than {stage.split('@')[0]}.max_reject_rate = "
            f"{max_reject_rate:g}; the first reason: {rejects[0].reason}"
        )


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for the same bytes, or a copy on another file system. What is written later must replace such a
    file, never write into it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def readable_by_all(folder: Path) -> None:
    """Let whoever shares the disk read a folder that was written as a temporary one."""
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755 if place.is_dir() else 0o644)


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a tqdm bar in JupyterLab, or log lines (rate, time left) in a batch run: after five seconds, then in
    pauses that grow up to five minutes. `total` is how many there are, where they have no length."""
    total = len(items) if total is None else total
    if "JPY_SESSION_NAME" in os.environ:
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=label, total=total)
        return
    start = last = time.monotonic()
    pause = 5.0
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= pause:
            rate = done / (now - start)
            left = hours_and_minutes((total - done) / rate)
            log.info("%s: %d/%d, %.2f/s, %s left", label, done, total, rate, left)
            last, pause = now, min(1.5 * pause, 300.0)
        yield item
    if total:
        log.info("%s: %d done in %s", label, total, hours_and_minutes(time.monotonic() - start))


def hours_and_minutes(seconds: float) -> str:
    """45 s, 12 min, 2:05 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
