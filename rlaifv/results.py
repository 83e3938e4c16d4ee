"""What an iteration leaves in data/results, read back for report and cards."""

import csv
import json
import math
from pathlib import Path

from rlaifv.records import read_jsonl


def read_result(folder: Path) -> dict:
    """Everything that one round's select (or the baseline) left in `data/results/<round>`."""
    result = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    result |= {path.stem: read_jsonl(path) for path in sorted(folder.glob("*.jsonl"))}
    if (folder / "log.csv").is_file():
        with (folder / "log.csv").open() as stream:
            result["log"] = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    return result


def read_timings(folder: Path) -> list[dict]:
    """The wall minutes and peak memory that every stage noted; they lie outside `data/`, for they are never equal."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _number(text: str) -> float:
    return float(text) if text else math.nan
