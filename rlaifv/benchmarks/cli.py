"""What all commands share: files in, a table and JSON out, one clear line for a wrong input."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlaifv.benchmarks.scores import Scores
from rlaifv.benchmarks.statistics import Comparison, compare, intervals


def command(module: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m rlaifv.benchmarks.MODULE` with the options that every command has."""
    parser = argparse.ArgumentParser(prog=f"python -m rlaifv.benchmarks.{module}", description=description)
    parser.add_argument("--answers", required=True, help=".json or .jsonl, LLaVA-style or lmms-eval fields")
    parser.add_argument("--against", help="answers of another model: a paired test of --answers against it")
    parser.add_argument("--rows", help="write the per-row table here, one JSON object a line")
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    return parser


def run(options: argparse.Namespace, scorer: Callable[[str], tuple[Scores, Iterable[Mapping[str, Any]]]]) -> None:
    """Score and print; a wrong file, name or value ends the command with one line.

    Args:
        options: parsed options of `command`.
        scorer: path of an answer file → its scores, and the rows of the file that are no answers.
    """
    try:
        scores, bad = scorer(options.answers)
        scores = replace(scores, missing=[*bad, *scores.missing])
        bounds = intervals(scores)
        tests = compare(scorer(options.against)[0], scores) if options.against else []
        if options.rows:
            write_rows(options.rows, scores.rows)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        sys.exit(f"error: {error}")
    print_scores(scores, bounds, tests)
    if options.json:
        compared = {"against": options.against, "tests": [asdict(test) for test in tests]} if tests else {}
        print(json.dumps({**scores.report(), "intervals": bounds, **compared}))
    if not scores.rows:
        sys.exit("error: no answer could be scored; the reasons are listed above")


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a per-row table as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")


def print_scores(
    scores: Scores,
    bounds: Mapping[str, tuple[float, float]],
    tests: Sequence[Comparison] = (),
    listed: int = 20,
) -> None:
    """Print rates with their 95 % intervals, counts, settings, tests, and the first of what is missing."""
    for name, value in scores.metrics.items():
        if name in scores.rates:
            scale, unit = (1, "") if name in scores.means else (100, " %")
            low, high = bounds[name]
            print(f"{name:>24}  {scale * value:.2f}{unit}  [{scale * low:.2f}, {scale * high:.2f}]")
        else:
            print(f"{name:>24}  {value:.6g}")
    for name, value in scores.settings.items():
        print(f"{name:>24}  {value}")
    for test in tests:
        change = f"{test.a:.4f} → {test.b:.4f}, {test.difference:+.4f} [{test.low:+.4f}, {test.high:+.4f}]"
        print(f"{'against, ' + test.rate:>24}  {change}, p = {test.p_value:.4f}, n = {test.n}")
    if scores.missing:
        print(f"not scored: {len(scores.missing)}")
    for row in scores.missing[:listed]:
        print(f"  {row['id']}: {row['reason']}")
    if len(scores.missing) > listed:
        print(f"  and {len(scores.missing) - listed} more; --json lists them all")
