"""The resumable store that every long stage writes through: chunks that survive a kill, published whole."""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaifv import ROOT
from rlaifv.fingerprint import digest
from rlaifv.records import Reject, T, to_json, write_atomic

log = logging.getLogger(__name__)


class TooManyRejects(RuntimeError):
    """More rows were rejected than `max_reject_rate` allows: the input or the model does not fit the stage."""


class Store:
    """Work that survives `kill -9`: chunks of rows, each written atomically under a key of all that determines it.

    The key covers parameters, model fingerprints, input hashes and the stage's source, so work of another model or
    input is never taken up again. Chunk borders depend on the input alone; a killed chunk is done again whole, so
    that an interrupted run ends in the same bytes as an uninterrupted one.
    """

    def __init__(self, stage: str, key: Mapping[str, Any], root: Path | None = None) -> None:
        self.stage = stage
        self.folder = (root or ROOT / "scratch") / f"{stage}-{digest(key)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        # one generation of work per stage is enough; older keys can never match again
        for other in self.folder.parent.glob(f"{stage}-*"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.jsonl"

    def pending(self, chunks: Sequence[T]) -> Iterator[tuple[int, T]]:
        """The chunks that are not done yet, with progress; says how much an earlier run had finished."""
        todo = [i for i in range(len(chunks)) if not self._file(i).exists()]
        if len(todo) < len(chunks):
            log.info("%s: %d of %d chunks are done already, going on", self.stage, len(chunks) - len(todo), len(chunks))
        for i in progress(todo, self.stage):
            yield i, chunks[i]

    def write(self, index: int, rows: Iterable[Any], rejects: Iterable[Reject] = ()) -> None:
        lines = ["row " + to_json(row) + "\n" for row in rows] + ["reject " + to_json(r) + "\n" for r in rejects]
        write_atomic(self._file(index), "".join(lines))

    def publish(self, rows_path: Path, n_inputs: int, max_reject_rate: float) -> tuple[int, int]:
        """Put all chunks together as `rows_path` and `rejects.jsonl` beside it; return their row counts.

        Raises TooManyRejects, with the commonest reason, when rejects exceed `max_reject_rate` of `n_inputs`.
        """
        rows, rejects = [], []
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # splitlines also splits at U+0085
                kind, _, body = line.partition(" ")
                (rows if kind == "row" else rejects).append(body + "\n")
        check_rejects(self.stage, [Reject(**json.loads(r)) for r in rejects], n_inputs, max_reject_rate)
        write_atomic(rows_path.parent / "rejects.jsonl", "".join(rejects))
        write_atomic(rows_path, "".join(rows))
        return len(rows), len(rejects)


def check_rejects(stage: str, rejects: Sequence[Reject], n_inputs: int, max_reject_rate: float) -> None:
    if len(rejects) > max_reject_rate * n_inputs:
        reasons = [r.reason for r in rejects]
        raise TooManyRejects(
            f"{stage}: {len(rejects)} of {n_inputs} rows rejected, more than {stage}.max_reject_rate = "
            f"{max_reject_rate:g}; the first reason: {reasons[0]}"
        )


def progress(items: Sequence[T], label: str, every: float = 5.0) -> Iterator[T]:
    """Iterate with a tqdm bar in JupyterLab, or a log line every few seconds (rate, time left) in a batch run."""
    if "JPY_SESSION_NAME" in os.environ:
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=label)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= every:
            rate = done / (now - start)
            left = (len(items) - done) / rate
            log.info("%s: %d/%d, %.2f/s, %.0f s left", label, done, len(items), rate, left)
            last = now
        yield item
    if items:
        log.info("%s: %d done in %.1f s", label, len(items), time.monotonic() - start)
