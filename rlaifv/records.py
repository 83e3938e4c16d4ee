"""Record schemas, and how they are written to and read from JSON lines.

Rows are plain dataclasses with stable ids. A stage reads rows and writes one output row (or several) per input row,
or a reject saying why not; nothing disappears.
"""

import dataclasses
import json
import math
import os
import platform
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

IMAGE_PLACES = re.compile(r"^(\s*<image>\s*)+|(\s*<image>\s*)+$")
"""Where LLaVA's instruction files say that a question comes with an image: before or after it."""

RATES = ("response_hallucination", "mention_hallucination", "recall")
"""The rates that every row about a model's answers has: fractions, the first two better when low."""

CLAIM_RATES = ("response_rejection", "claim_rejection", "accepted_claims")
"""What stands in their place where no annotation says what is true, and a labeler judges the answers' claims: the share
of answers with a rejected claim, the share of rejected claims, and accepted claims an answer (a mean, no fraction)."""


def rates_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The names of a row's rates: `RATES`, or `CLAIM_RATES` where its answers were judged by claims. Either way the
    first two are better when low, and the third says whether little is wrong because little is said."""
    return CLAIM_RATES if CLAIM_RATES[0] in row else RATES


def columns_of(row: Mapping[str, Any]) -> list[str]:
    """What a table shows of such rows: by claims also who judged, and whether that labeler made the feedback too."""
    return [*rates_of(row), "mean_words", "n", *(("labeler", "same_labeler") if "labeler" in row else ())]


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
    """The labeler's P(yes) and P(no) at the first answer token; accepted iff p_yes > p_no (ValueError otherwise)."""

    claim_id: str
    p_yes: float
    p_no: float
    accepted: bool
    labeler: str

    def __post_init__(self) -> None:
        if self.accepted != (self.p_yes > self.p_no):
            verdict = "accepted" if self.accepted else "rejected"
            raise ValueError(f"claim {self.claim_id} is {verdict} although p_yes is {self.p_yes} and p_no {self.p_no}")


def yes_share(p_yes: float, p_no: float) -> float:
    """P(yes) among yes and no, from 0 to 1."""
    return p_yes / max(p_yes + p_no, 1e-12)


SETTINGS = ("processor", "template", "system")
"""The settings of a model that change what it is shown."""


@dataclass(frozen=True)
class ModelRecord:
    """Who plays a role in a run (policy, labeler or divider), as the stage `models` found it.

    `fingerprint` changes with any byte of a checkpoint, with the commit of a hub model, with `settings`, or with what
    a server's model is called and answers. `processor`, `template` and `system` are those of `ModelParams`.
    """

    path: str
    revision: str | None
    dtype: str
    device: str
    fingerprint: str
    engine: str = "transformers"
    load_in_4bit: bool = False
    processor: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    system: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Those of `SETTINGS` that are set."""
        return {name: getattr(self, name) for name in SETTINGS if getattr(self, name)}


@dataclass(frozen=True)
class Reject:
    """An input row that gave no output, and why."""

    id: str
    stage: str
    reason: str


def to_json(row: Any, indent: int | None = None) -> str:
    """A record, or whatever else is written, as JSON. Raises ValueError that names the record and the field for a
    number that is not finite: JSON has none, and who reads it would take it for a measurement."""
    content = dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        for place, number in not_finite(content):
            kind = f"{type(row).__name__} {next(iter(content.values()))}: " if content is not row else ""
            raise ValueError(f"{kind}{place} is {number}, expected a finite number") from None
        raise


def not_finite(content: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Where in a JSON value a number is not finite, as `rates.recall[1]`, and that number."""
    if isinstance(content, float) and not math.isfinite(content):
        yield place or "the value", content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from not_finite(value, f"{place}.{key}".lstrip("."))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from not_finite(value, f"{place}[{index}]")


def json_object(text: Any) -> dict[str, Any]:
    """The object that a text holds as JSON; {} where it holds none."""
    try:
        found = parse_json(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomic(path: Path, text: str, shared: bool = False) -> None:
    """Write the whole file or nothing: a reader never sees half of it, whenever the process dies.

    `shared`: another machine may be writing the same; a kill then leaves a partial file of a name of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{platform.node()}-{os.getpid()}" if shared else ""
    partial = path.with_name(f"{path.name}{mine}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_atomic(path, "".join(to_json(row) + "\n" for row in rows))


def parse_json(text: str) -> Any:
    """A JSON value; ValueError in a few words for any text that is none, or one that nobody means."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:  # Python's own limit, which its message tells how to lift
        raise ValueError("a number of thousands of digits") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1; a byte order mark is no text."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open(encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
        except UnicodeDecodeError:
            raise ValueError(
                f"{path} is not UTF-8 (latin-1 or UTF-16, perhaps): convert it, such as with "
                f"`iconv -f latin1 -t utf-8 {path.name}`"
            ) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; a broken line is named by its number."""
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def read_records(path: Path, kind: type[T]) -> list[T]:
    """All rows of a file as records of one kind, whose first field is their id.

    Raises ValueError with file and line for a row that is none (a field missing, unknown or of another type, a number
    that is not finite, what the record itself refuses) and for an id that was there before.
    """
    hints, rows, seen = typing.get_type_hints(kind), [], set()
    identity = next(iter(hints))
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or row.keys() != hints.keys():
            raise ValueError(f"{where}: no {kind.__name__}: its fields are {', '.join(hints)}, got {str(row)[:80]}")
        for name, hint in hints.items():
            value = row[name]
            if type(value) is not hint and not (hint is float and type(value) is int):
                raise ValueError(f"{where}: {name} is {value!r}, expected {hint.__name__}")
            if hint is float and not math.isfinite(value):
                raise ValueError(f"{where}: {name} is {value}, expected a finite number")
        if row[identity] in seen:
            raise ValueError(f"{where}: {identity} {row[identity]!r} was there before")
        seen.add(row[identity])
        try:
            rows.append(kind(**row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return rows


def batched(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def text_of(row: dict[str, Any], name: str, default: str | None = None) -> str:
    """A field that must be text (an id may be a whole number as well); `default` for one that is missing or null.

    Raises ValueError for any other value and for text that no UTF-8 file can hold.
    """
    value = row.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"has no field {name!r}")
    if name in ("id", "ds_question_id") and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.40}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character, {value[error.start]!r}") from None
    return value
