"""What all commands share: files in, a table and JSON out, one clear line for a wrong input."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlaifv.benchmarks.judge import Judge, load_judge, open_judge
from rlaifv.benchmarks.spec import Spec, print_table
from rlaifv.evaluation.bootstrap import Comparison, compare_paired, intervals
from rlaifv.evaluation.scores import Scores
from rlaifv.params import ServerParams
from rlaifv.records import to_json, write_jsonl


def command(module: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m rlaifv.benchmarks.MODULE` with the options that every command has."""
    parser = argparse.ArgumentParser(prog=f"python -m rlaifv.benchmarks.{module}", description=description)
    parser.add_argument(
        "--answers", required=True, help=".json, .jsonl or .csv; LLaVA-style, lmms-eval's or chair.py's fields"
    )
    parser.add_argument("--against", help="answers of another model: a paired test of --answers against it")
    parser.add_argument("--rows", help="write the per-row table here, one JSON object a line")
    parser.add_argument("--published", action="store_true", help="print the paper's rows below ours")
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmarks that ask a judge."""
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--judge", help="name of the judge at an OpenAI-compatible server")
    judge.add_argument("--judge-model", help="a language model to judge in this process: folder or hub id")
    parser.add_argument("--base-url", help="the server, such as http://localhost:8000/v1 (key: $OPENAI_API_KEY)")
    parser.add_argument("--cache", help="file of raw replies (default: beside the answers, .judge.jsonl)")
    parser.add_argument("--attempts", type=positive, default=3, help="times a row with unreadable replies is asked")
    parser.add_argument("--tries", type=positive, default=4, help="times a request that failed is sent")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one try")
    parser.add_argument("--concurrency", type=positive, default=8, help="requests in flight")
    parser.add_argument("--published-prompt", help="the published scorer's .py file, to use its prompt (see fetch)")


def judge_of(options: argparse.Namespace) -> Judge:
    """The judge that the options name."""
    if options.judge_model:
        return load_judge(options.judge_model)
    params = ServerParams(concurrency=options.concurrency, tries=options.tries, timeout=options.timeout)
    return open_judge(options.judge, options.base_url, params)


def cache_of(options: argparse.Namespace, answers: str) -> Path:
    """The file of raw replies: the one named, or one beside the answers."""
    return Path(options.cache) if options.cache else Path(f"{answers}.judge.jsonl")


def run(
    options: argparse.Namespace, scorer: Callable[[str], tuple[Scores, Iterable[Mapping[str, Any]]]], spec: Spec
) -> None:
    """Score and print; a wrong file, name or value ends the command with one line.

    Args:
        options: parsed options of `command`.
        scorer: path of an answer file → its scores, and the rows of the file that are no answers.
        spec: the kind of benchmark.
    """
    try:
        scores, bad = scorer(options.answers)
        scores = replace(scores, missing=[*bad, *scores.missing])
        bounds = intervals(scores)
        tests = compare_paired(scorer(options.against)[0], scores) if options.against else []
        if options.rows:
            write_jsonl(Path(options.rows), scores.rows)
    except (OSError, ValueError, FloatingPointError, ModuleNotFoundError) as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        sys.exit(f"error: {error}")
    print_scores(scores, bounds, tests)
    if options.published:
        print_table(spec.table(scores, Path(options.answers).name))
    nothing = {} if scores.rows else {"error": "no answer could be scored; the reasons are listed"}
    if options.json:
        compared = {"against": options.against, "tests": [asdict(test) for test in tests]} if tests else {}
        print(to_json({**scores.report(), "intervals": bounds, **compared, **nothing}))
    if without_verdict := scores.counts.get("n_without_verdict", 0):
        print(f"{without_verdict} verdicts are missing; run again to ask the judge for these alone", file=sys.stderr)
        sys.exit(3)
    if nothing:
        sys.exit(f"error: {nothing['error']}")


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
