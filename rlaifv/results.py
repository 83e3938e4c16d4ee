"""What an iteration leaves in data/results/K, as one record with one writer and one reader."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaifv import ROOT
from rlaifv.fingerprint import pipeline
from rlaifv.records import read_jsonl, to_json, write_atomic, write_jsonl

FILES = {
    "dev": "dev/dev.jsonl",
    "selection": "selection/selection.json",
    "pairs": "selection/pairs.json",
    "feedback": "selection/feedback.json",
    "log": "selection/log.jsonl",
    "test": "test/metrics.json",
    "answers": "test/answers.jsonl",
    "paired_test": "test/paired_test.json",
    "gallery": "test/gallery.jsonl",
    "benchmarks": "benchmarks/scores.json",
}
"""Part of a result → its file below data/results/K. The folder is the output of the stage that writes the part:
evaluate (dev), select, test and benchmarks."""

OF_TRAINING = ("selection", "pairs", "feedback", "log", "paired_test")
"""What iteration 0, the base model, has not: it was not trained, chosen, or compared with itself."""


@dataclass(frozen=True)
class Result:
    """One iteration's results; rates are fractions, with their 95 % intervals beside them. A part is None until its
    stage has run (`read_result` raises then, unless told what it needs)."""

    dev: list[dict] | None = None  # metrics on dev, a row per checkpoint; of iteration 0 one row, the base model
    selection: dict | None = None  # the chosen row of `dev`
    pairs: dict | None = None  # `pairs.statistics` of what was trained on
    feedback: dict | None = None  # `claims_made.describe_feedback`; None also for pairs that came from elsewhere
    log: list[dict] | None = None  # the training log, a row per step
    test: dict | None = None  # the policy's metrics on test
    answers: list[dict] | None = None  # its test answers, rows of id, image, question, answer
    paired_test: dict | None = None  # it against the base on the same rows, by rate
    gallery: list[dict] | None = None  # the first test answers with their judged claims
    benchmarks: dict[str, dict] | None = None  # name → what `suite.score` says; {} where none is configured


def write_result(folder: Path, **parts: Any) -> None:
    """Write some parts of a `Result` to an iteration's folder, each whole or not at all."""
    for name, value in parts.items():
        path = folder / FILES[name]
        if path.suffix == ".jsonl":
            write_jsonl(path, value)
        else:
            write_atomic(path, to_json(value) + "\n")


def read_result(folder: Path, *needed: str) -> Result:
    """Read an iteration's folder.

    Args:
        folder: data/results/K.
        needed: the parts to read; none named: all that this iteration must have.

    Raises:
        FileNotFoundError: a part that its stage has not written, with the stage's name.
    """
    absent = OF_TRAINING if folder.name == "0" else ()
    parts = {}
    for name in needed or [name for name in FILES if name not in absent]:
        path = folder / FILES[name]
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: the stage that writes {path.parent.name} has not run (dvc repro)")
        parts[name] = read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
    return Result(**parts)


def read_timings(folder: Path, iterations: Sequence[str] | None = None) -> list[dict]:
    """The wall minutes and peak memory that every stage noted (`peak_gpu_gb` where it used a GPU); they lie outside
    `data/`, for they are never equal. With `iterations` those of the pipeline's stages for them alone: what was run
    beside it, or for an iteration that is gone, is no part of what they took."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if iterations is None:
        return rows
    stages = pipeline(iterations)
    return [row for row in rows if row["stage"].replace("@0", "_base") in stages]


def last_line(summary: dict[str, Any]) -> str:
    """What became of the base, from metrics/summary.json: "response hallucination 55.7 % → 0.15 %, …"."""
    base, final = summary["base"], summary["final"]
    shown = ("response_hallucination", "response_rejection", "recall", "accepted_claims")

    def said(name: str, value: float) -> str:
        return f"{value:.3g}" if name == "accepted_claims" else f"{100 * value:.4g} %"

    changes = [
        f"{name.replace('_', ' ')} {said(name, base[name])} → {said(name, final[name])}"
        for name in shown
        if name in base
    ]
    return f"base → iteration {final['iteration']}, on test: {', '.join(changes)}"


def main() -> None:
    """What `make repro` ends with."""
    print(last_line(json.loads((ROOT / "metrics" / "summary.json").read_text())))
    print("report: plots/report.html, numbers: metrics/summary.json; next: `rlaifv chat`, `make lab`, `rlaifv export`")


if __name__ == "__main__":
    main()
