"""Read the answers to be scored: our own rows, LLaVA-style result files, lmms-eval samples, chair.py's output, CSV."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# "answer" stands before "text": some files put the question into "text". In lmms-eval files the answer is in
# "filtered_resps"; the "answer" of the "doc" there is the gold label, so answers are never looked up in "doc".
TEXT_FIELDS = (
    *("model_answer", "filtered_resps", "resps", "response", "model_response", "answer", "text", "caption"),
    *("output", "outputs", "prediction", "pred", "generated_text"),
)
QUESTION_FIELDS = ("question", "prompt", "raw_question", "query", "input")
IMAGE_FIELDS = (
    *("image_id", "image", "image_path", "image_file", "image_name", "file_name", "image_source"),
    *("image_url", "image_src", "filename", "image_filename", "img_id"),
)
ID_FIELDS = ("question_id", "id", "qid", "doc_id", "idx", "image_id")

_VALUE = re.compile(r"[^\s,]")
_COCO = re.compile(r"(?:.*_)?(\d{12})|(?:coco_(?:\w+_)?)?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """One model's answer to one question about one image."""

    id: str
    text: str
    question: str = ""
    image: str = ""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)


def read_json_objects(path: str | Path) -> tuple[list[dict], list[dict]]:
    """Every JSON object of a .json or .jsonl file, plain or gzipped, and what could not be read.

    Accepts a list, one object a line, objects that follow each other without a line break, an object that
    wraps the list ("imgToEval", "sentences", "samples", "logs", "results", "data"), and a missing final newline.

    Returns the objects and, for each piece that does not parse, {"id": "line 7", "reason"}.

    Raises:
        FileNotFoundError: with the path, when there is no such file.
        ValueError: the file holds no record at all, or no text.
    """
    text = _read_text(Path(path))
    records, bad, decoder = [], [], json.JSONDecoder()
    at = _next_value(text, 0)
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            end = text.find("\n", at)
            end = len(text) if end < 0 else end
            line = text.count("\n", 0, at) + 1
            bad.append({"id": f"line {line}", "reason": f"no JSON ({error.msg}): {text[at : min(end, at + 80)]}"})
            at = _next_value(text, end)
            continue
        at = _next_value(text, end)
        for record in _unwrap(value):
            if isinstance(record, Mapping):
                records.append(dict(record))
            else:
                line = text.count("\n", 0, end) + 1
                bad.append({"id": f"line {line}", "reason": f"no JSON object: {str(record)[:80]}"})
    if not records:
        reason = f"; {bad[0]['id']}: {bad[0]['reason']}" if bad else ""
        raise ValueError(f"{path} holds no records{reason}: expected a JSON list or one JSON object a line")
    return records, bad


def read_table(path: str | Path) -> tuple[list[dict], list[dict]]:
    """The rows of a .csv or .tsv file, plain or gzipped, as `read_json_objects` gives those of JSON.

    The first line names the columns; whichever of comma, semicolon and tab it holds most of stands between cells.
    """
    text = _read_text(Path(path))
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    records, bad = [], []
    try:
        for row in reader:
            cells = [cell for name, cell in row.items() if name is not None]
            if None in row or None in cells:
                columns = len(reader.fieldnames)
                reason = f"{'more' if None in row else 'fewer'} cells than the {columns} columns of the first line"
                bad.append({"id": f"line {reader.line_num}", "reason": reason})
            else:
                records.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no CSV ({error})") from None
    if not records:
        raise ValueError(
            f"{path} holds no rows: expected the names of the columns in its first line, then a row a line"
        )
    return records, bad


def _read_text(path: Path) -> str:
    """The text of a file; what it begins with, not its name, says whether it is gzipped or UTF-16."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder: give a file" if path.is_dir() else f"no such file: {path}")
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is cut off or damaged ({error}): get it again") from None
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: no UTF-8 text; save the file as UTF-8") from None


def _next_value(text: str, at: int) -> int:
    """Where the next JSON value begins at or after `at`; the end of the text when none is left."""
    match = _VALUE.search(text, at)
    return match.start() if match else len(text)


def _unwrap(value: Any) -> Iterable[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping):
        for key in ("imgToEval", "sentences", "samples", "logs", "results", "data"):
            inner = value.get(key)
            if isinstance(inner, Mapping) and inner and all(isinstance(row, Mapping) for row in inner.values()):
                return list(inner.values())
            if isinstance(inner, list) and any(isinstance(row, Mapping) for row in inner):
                return inner
    return [value]


def lookup(record: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of `names` that is text or a number in the record or in lmms-eval's "doc"; else "".

    A whole number may be written as 12.0 (pandas does) and a single value as a list of one.
    """
    doc = record.get("doc") if isinstance(record.get("doc"), Mapping) else {}
    for name in names:
        for holder in (record, doc):
            value = holder.get(name)
            if isinstance(value, list) and len(value) == 1:
                value = value[0]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, str | int) and not isinstance(value, bool):
                return str(value).strip()
    return ""


def to_answers(records: Iterable[Mapping[str, Any]]) -> tuple[list[Answer], list[dict]]:
    """Answers from records with any of the known field names, and the records without one, with reasons.

    A record without an id gets its number in the file, so that nothing is lost.
    """
    answers, bad = [], []
    for number, record in enumerate(records):
        identity = lookup(record, ID_FIELDS) or str(number)
        name = next((name for name in TEXT_FIELDS if record.get(name) is not None), None)
        text = record.get(name)
        while isinstance(text, list) and text:
            text = text[0]
        if not isinstance(text, str):
            bad.append({"id": identity, "reason": _no_text(record, name)})
            continue
        image = lookup(record, IMAGE_FIELDS)
        if not image and Path(named := lookup(record, ID_FIELDS)).suffix:
            image = named  # Object HalBench files name the image in "question_id"
        text = text.removeprefix("Assistant:").strip()
        answers.append(Answer(identity, text, lookup(record, QUESTION_FIELDS), image, record))
    return answers, bad


def _no_text(record: Mapping[str, Any], name: str | None) -> str:
    """Why a record is no answer; `name` is its answer's field, None where there is none or it is null."""
    if name:
        return f"{name} is {str(record[name])[:40]!r}, expected a text"
    if null := next((name for name in TEXT_FIELDS if name in record), None):
        return f"{null} is null, expected a text"
    found = ", ".join(sorted(map(str, record))) or "no fields"
    return f"no answer text among {', '.join(TEXT_FIELDS)} (found: {found})"


def read_answers(path: str | Path) -> tuple[list[Answer], list[dict]]:
    """Answers of a file, and every row of it that is none, each with its reason."""
    table = Path(str(path).removesuffix(".gz")).suffix.lower() in (".csv", ".tsv")
    records, bad = read_table(path) if table else read_json_objects(path)
    answers, without_text = to_answers(records)
    return answers, bad + without_text


def plain(question: str) -> str:
    """A question for comparison: lower case, single blanks."""
    return " ".join(question.lower().split())


def image_keys(image: str) -> tuple[str, ...]:
    """The keys that an image id, file name or path may have in a table of images, the most literal first.

    "COCO_val2014_000000123456.jpg", "val2014/000000123456.jpg", "000000123456" and 123456 are one COCO image.
    """
    stem = _stem(image)
    number = coco_number(image)
    return (image, stem, number) if number else (image, stem)


def coco_number(image: str) -> str:
    """The number of a COCO image by its number, file name or path; "" for any other name.

    Other numbers at a name's end mean nothing: "kitchen_20.jpg" is not COCO's image 20.
    """
    match = _COCO.fullmatch(_stem(image))
    return str(int(match[1] or match[2])) if match else ""


def _stem(image: str) -> str:
    """The file name without folders, Windows ones too, and without its ending."""
    return Path(image.replace("\\", "/")).stem


def image_key(image: str, known: Mapping[str, Any]) -> str | None:
    """The key of `known` that `image` means; None when it means none."""
    return next((key for key in image_keys(image) if key in known), None)
