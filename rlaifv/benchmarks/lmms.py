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
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlaifv.evaluation.answers import Answer, read_answers
from rlaifv.records import to_json, write_jsonl

NO_ABILITY = ("yes_ratio", "yes-ratio")
"""Parts of the names of numbers of which neither more nor less is better."""


@dataclass(frozen=True)
class Results:
    """What a result file says: task → metric → number ("mmstar" → {"average": 0.33, "average_stderr": …}), and task →
    metric → whether more of it is better, as far as it says."""

    numbers: Mapping[str, Mapping[str, float]]
    higher_is_better: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ability:
    """One number of a general benchmark before and after alignment.

    Attributes:
        lost: the aligned model is worse by more than the tolerance allows.
        certain: the change exceeds 1.96 standard errors; None where the files give no standard error.
        higher_is_better: as the files say; where they do not, it is.
    """

    task: str
    metric: str
    base: float
    aligned: float
    lost: bool
    certain: bool | None
    higher_is_better: bool = True

    @property
    def change(self) -> float:
        """aligned − base, in the benchmark's own unit."""
        return self.aligned - self.base


def read_results(path: str | Path) -> Results:
    """The numbers of an lmms-eval result file.

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
        content = json.loads(path.read_text(encoding="utf-8"))
        results = dict(content["results"])
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
    directions = content.get("higher_is_better")
    said = {task: row for task, row in directions.items() if isinstance(row, Mapping)} if directions else {}
    return Results(tasks, {t: {name: up for name, up in row.items() if up is not None} for t, row in said.items()})


def guard(base: Results, aligned: Results, tolerance: float = 0.02) -> list[Ability]:
    """Compare all numbers that both models have, but for those of which neither direction is better (`NO_ABILITY`).

    Args:
        base, aligned: of `read_results`.
        tolerance: the share of the base model's number that may be lost.

    Raises:
        ValueError: no number in common.
    """
    found = []
    for task, numbers in base.numbers.items():
        others = aligned.numbers.get(task, {})
        for metric, before in numbers.items():
            after = others.get(metric)
            if after is None or "_stderr" in metric or any(name in metric.lower() for name in NO_ABILITY):
                continue
            error = next((name for name in numbers if _is_error_of(name, metric) and name in others), None)
            certain = error and abs(after - before) > 1.96 * math.hypot(numbers[error], others[error])
            up = _more_is_better(task, metric, base, aligned)
            lost = (before - after if up else after - before) > tolerance * abs(before)
            found.append(Ability(task, metric, before, after, lost, certain, up))
    if not found:
        known = (", ".join(results.numbers) or "none" for results in (base, aligned))
        raise ValueError(f"no benchmark in common: {' against '.join(known)}")
    return found


def _more_is_better(task: str, metric: str, *files: Results) -> bool:
    """What the first file that says it of this metric says."""
    name = metric.partition(",")[0]
    return next((said for file in files if (said := file.higher_is_better.get(task, {}).get(name)) is not None), True)


def _is_error_of(name: str, metric: str) -> bool:
    """Whether `name` is a standard error of the metric: of "acc,strict" are "acc_stderr,strict" and
    "acc_stderr_clt,strict", of which a file has as numbers only those that were computed."""
    (of, _, part), (wanted, _, wanted_part) = name.partition(","), metric.partition(",")
    return of.startswith(f"{wanted}_stderr") and part == wanted_part


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
        word = ("LOST" if ability.lost else "kept") + ("" if ability.higher_is_better else " (less is better)")
        print(f"{ability.task:>24} {ability.metric:>20}  {ability.base:.4g} → {ability.aligned:.4g}  {word}{sure}")
    lost = [f"{ability.task} {ability.metric}" for ability in found if ability.lost]
    if options.json:
        print(to_json({"lost": lost, "abilities": [{**asdict(a), "change": a.change} for a in found]}))
    if lost:
        sys.exit(f"{len(lost)} of {len(found)} abilities lost more than {options.tolerance:.0%}: {', '.join(lost)}")


if __name__ == "__main__":
    main()
