"""Record schemas, JSON lines, and the resumable store that every long stage writes through.

Rows are plain dataclasses with stable ids. A stage reads rows and writes one output row (or several) per input row,
or a reject saying why not; nothing disappears.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlaifv import ROOT

log = logging.getLogger(__name__)
T = TypeVar("T")

RATES = ("response_hallucination", "mention_hallucination", "recall")
"""The rates that every row about a model's answers has: fractions, the first two better when low."""


@dataclass(frozen=True)
class Instruction:
    """A question about an image. `image_path` is relative to the image root of the file it came from."""

    id: str
    image_path: str
    question: str
    reference: str = ""
    source: str = ""


@dataclass(frozen=True)
class Candidate:
    """One sampled answer. `finish_reason` is "stop" (end token) or "length" (cut at max_new_tokens)."""

    id: str
    instruction_id: str
    sample: int
    answer: str
    n_tokens: int
    finish_reason: str
    seed: int
    model: str


@dataclass(frozen=True)
class Claim:
    """An atomic claim of a candidate and the yes/no question that checks it."""

    id: str
    candidate_id: str
    claim: str
    question: str


@dataclass(frozen=True)
class Judgement:
    """The labeler's P(yes) and P(no) at the first answer token; accepted iff p_yes > p_no."""

    claim_id: str
    p_yes: float
    p_no: float
    accepted: bool
    labeler: str


@dataclass(frozen=True)
class Reject:
    """An input row that gave no output, and why."""

    id: str
    stage: str
    reason: str


def to_json(row: Any) -> str:
    return json.dumps(dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row, ensure_ascii=False)


def write_atomic(path: Path, text: str) -> None:
    """Write the whole file or nothing: a reader never sees half of it, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_atomic(path, "".join(to_json(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; a broken line is named by its number."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    rows = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return rows


def read_records(path: Path, kind: type[T]) -> list[T]:
    return [kind(**row) for row in read_jsonl(path)]


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


def batched(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


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
