"""Exchange with lmms-eval, and a guard against buying fewer hallucinations with lost ability.

    python -m rlaifv.benchmarks.lmms guard --base results_base.json --aligned results_aligned.json --json
    python -m rlaifv.benchmarks.lmms export --answers answers.jsonl --task my_task --out samples.jsonl

General ability (MMStar, LLaVA-Bench, …) is measured by lmms-eval itself; its result files are read here. Our answers
are written as its sample files, for its tools and viewers.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlaifv.evaluation.answers import Answer, read_answers
from rlaifv.records import to_json, write_jsonl


@dataclass(frozen=True)
class Ability:
    """One number of a general benchmark before and after alignment.

    Attributes:
        lost: the aligned model is worse by more than the tolerance allows.
        certain: the change exceeds 1.96 standard errors; None where the files give no standard error.
    """

    task: str
    metric: str
    base: float
    aligned: float
    lost: bool
    certain: bool | None

    @property
    def change(self) -> float:
        """aligned − base, in the benchmark's own unit."""
        return self.aligned - self.base


def read_results(path: str | Path) -> dict[str, dict[str, float]]:
    """The numbers of an lmms-eval result file: task → metric ("mmstar" → {"average": 0.33, "average_stderr": …}).

    Args:
        path: a `*_results.json`/`results_*.json`, or a folder, of which the newest such file is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no "results".
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*results*.json"), key=lambda file: (file.stat().st_mtime, file.name))
        if not files:
            raise FileNotFoundError(f"no *results*.json in {path}: expected what lmms-eval writes to --output_path")
        path = files[-1]
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        results = dict(json.loads(path.read_text(encoding="utf-8"))["results"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is no result file of lmms-eval: it has no "results"') from None
    tasks = {}
    for task, values in results.items():
        if not isinstance(values, Mapping):
            continue
        numbers = {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        if numbers:
            tasks[task] = numbers
    return tasks


def guard(
    base: Mapping[str, Mapping[str, float]], aligned: Mapping[str, Mapping[str, float]], tolerance: float = 0.02
) -> list[Ability]:
    """Compare all numbers that both models have.

    Args:
        base, aligned: of `read_results`.
        tolerance: the share of the base model's number that may be lost.

    Raises:
        ValueError: no number in common.
    """
    found = []
    for task in base:
        for metric, before in base[task].items():
            after = aligned.get(task, {}).get(metric)
            if after is None or "_stderr" in metric:
                continue
            errors = [numbers[task].get(_error_of(metric)) for numbers in (base, aligned)]
            certain = None
            if None not in errors:
                certain = abs(after - before) > 1.96 * math.hypot(*errors)
            lost = after < before - tolerance * abs(before)
            found.append(Ability(task, metric, before, after, lost, certain))
    if not found:
        raise ValueError(f"no benchmark in common: {', '.join(base) or 'none'} against {', '.join(aligned) or 'none'}")
    return found


def _error_of(metric: str) -> str:
    """The name of a metric's standard error: "acc" → "acc_stderr", "acc,strict" → "acc_stderr,strict"."""
    name, comma, part = metric.partition(",")
    return f"{name}_stderr{comma}{part}"


def sample_rows(answers: Iterable[Answer], task: str) -> list[dict]:
    """Answers as lmms-eval's sample rows; `answers.read_answers` reads them back."""
    rows = []
    for number, answer in enumerate(answers):
        doc = {"question_id": answer.id, "question": answer.question, "image_id": answer.image}
        reply = {"resps": [[answer.text]], "filtered_resps": [answer.text]}
        rows.append({"doc_id": number, "task": task, "doc": doc, "target": "", "input": answer.question, **reply})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The commands `guard` and `export`."""
    parser = argparse.ArgumentParser(prog="python -m rlaifv.benchmarks.lmms", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    guarding = commands.add_parser("guard", help="compare general ability before and after alignment")
    guarding.add_argument("--base", required=True, help="lmms-eval result file or folder of the base model")
    guarding.add_argument("--aligned", required=True, help="the same of the aligned model")
    guarding.add_argument("--tolerance", type=float, default=0.02, help="share that may be lost (default 0.02)")
    guarding.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    exporting = commands.add_parser("export", help="write answers as an lmms-eval sample file")
    exporting.add_argument("--answers", required=True)
    exporting.add_argument("--task", required=True, help="name of the task in the sample rows")
    exporting.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    try:
        if options.command == "export":
            answers, bad = read_answers(options.answers)
            write_jsonl(Path(options.out), sample_rows(answers, options.task))
            print(f"{len(answers)} samples in {options.out}")
            for row in bad:
                print(f"  left out: {row['id']}: {row['reason']}")
            return
        found = guard(read_results(options.base), read_results(options.aligned), options.tolerance)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for ability in found:
        sure = {True: ", beyond its standard error", False: ", within its standard error", None: ""}[ability.certain]
        word = "LOST" if ability.lost else "kept"
        print(f"{ability.task:>24} {ability.metric:>20}  {ability.base:.4g} → {ability.aligned:.4g}  {word}{sure}")
    lost = [f"{ability.task} {ability.metric}" for ability in found if ability.lost]
    if options.json:
        print(to_json({"lost": lost, "abilities": [{**asdict(a), "change": a.change} for a in found]}))
    if lost:
        sys.exit(f"{len(lost)} of {len(found)} abilities lost more than {options.tolerance:.0%}: {', '.join(lost)}")


if __name__ == "__main__":
    main()
