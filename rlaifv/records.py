"""Record schemas, JSON lines, and the resumable store that every long stage writes through.

Rows are plain dataclasses with stable ids. A stage reads rows and writes one output row (or several) per input row,
or a reject saying why not; nothing disappears.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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


def batched(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
