"""What the commands of all benchmarks share: the options for output, and one clear line for a wrong input."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlaifv.benchmarks.scores import Scores


def command(module: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m rlaifv.benchmarks.MODULE` with the options that every command has."""
    parser = argparse.ArgumentParser(prog=f"python -m rlaifv.benchmarks.{module}", description=description)
    parser.add_argument("--rows", help="write the per-row table here, one JSON object a line")
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    return parser


def run(options: argparse.Namespace, scorer: Callable[[], tuple[Scores, Iterable[Mapping[str, Any]]]]) -> None:
    """Score and print; a wrong file, name or value ends the command with one line.

    Args:
        options: parsed options of `command`.
        scorer: returns the scores and the rows of the file that are no answers; both lists are shown.
    """
    try:
        scores, bad = scorer()
        scores = replace(scores, missing=[*bad, *scores.missing])
        if options.rows:
            write_rows(options.rows, scores.rows)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    print_scores(scores)
    if options.json:
        print(json.dumps(scores.report()))
    if not scores.rows:
        sys.exit("error: no answer could be scored; the reasons are listed above")


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a per-row table as JSON lines."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def print_scores(scores: Scores, listed: int = 20) -> None:
    """Print rates, counts, settings, and the first of what is missing."""
    for name, value in scores.metrics.items():
        share = name in scores.rates and name not in scores.means
        print(f"{name:>24}  {100 * value:.2f} %" if share else f"{name:>24}  {value:.6g}")
    for name, value in scores.settings.items():
        print(f"{name:>24}  {value}")
    if scores.missing:
        print(f"not scored: {len(scores.missing)}")
    for row in scores.missing[:listed]:
        print(f"  {row['id']}: {row['reason']}")
    if len(scores.missing) > listed:
        print(f"  and {len(scores.missing) - listed} more; --json lists them all")
