"""What the suite, the commands and the report know of a kind of benchmark: each module brings one `SPEC`.

A number is comparable with a paper's only when it was made by the same judge and the same protocol. Those judges are
retired, so most scores of today are not, and the table says why.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaifv.benchmarks.judge import Judge
from rlaifv.evaluation.scores import Scores
from rlaifv.params import BenchmarkParams

V1, V2 = "arXiv 2405.17220v1", "arXiv 2405.17220v2 (CVPR 2025)"

Scorer = Callable[[BenchmarkParams, Path, Judge | None, Path], tuple[Scores, list[dict]]]
"""(entry of the parameter file, answers, its judge, file of the judge's replies) → scores, and the rows of the answer
file that are no answers."""


@dataclass(frozen=True)
class Published:
    """One model's published result: rates as fractions, MMHal's score in points."""

    model: str
    source: str
    metrics: Mapping[str, float]


def published(model: str, source: str, **metrics: float) -> Published:
    return Published(model, source, metrics)


@dataclass(frozen=True)
class Spec:
    """A kind of benchmark.

    Attributes:
        kind: its name in the parameter file and in `Scores.benchmark`.
        score: score one entry of the parameter file.
        headlines: what a report shows: its hallucination rates, and what tells saying less from knowing more.
        prompts: files of the published scorer that hold its judge's prompts; 0 without a judge.
        truth: whether the truth is in files of its own; else it is in the questions, and the scorer reads these.
        rows: published results; without any, ours are compared with none.
        protocol: what the published protocol is, as our scorer names it in `Scores.settings` and counts it.
    """

    kind: str
    score: Scorer
    headlines: tuple[str, ...]
    prompts: int = 0
    truth: bool = False
    rows: tuple[Published, ...] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, scores: Scores) -> list[str]:
        """What keeps a score from being compared with the published rows; empty when nothing does."""
        if not self.rows:
            return [f"no published row of {self.kind} is kept here"]
        found = []
        for name, wanted in self.protocol.items():
            given = {**scores.counts, **scores.settings}.get(name, "unknown")
            same = str(given).startswith("published ") if wanted == "published" else given == wanted
            if not same:
                found.append(f"{name}: {given}, published: {wanted}")
        if scores.missing:
            found.append(f"{len(scores.missing)} rows are not scored")
        return found

    def table(self, scores: Scores, model: str) -> list[dict]:
        """Our score above the published rows, ready for a data frame.

        Returns:
            Rows {"model", "source", metrics…, "comparable", "because"}; "because" says why ours is not comparable.
        """
        names = list(dict.fromkeys(name for row in self.rows for name in row.metrics))
        reasons = self.differences(scores)
        ours = {name: scores.metrics.get(name) for name in names}
        first = {"model": model, "source": "this run", **ours, "comparable": not reasons, "because": "; ".join(reasons)}
        others = [
            {"model": row.model, "source": row.source, **{name: row.metrics.get(name) for name in names}}
            for row in self.rows
        ]
        return [first, *others]


def print_table(rows: Sequence[Mapping]) -> None:
    """Print `Spec.table`, rates in percent."""
    names = [name for name in rows[0] if name not in ("model", "source", "comparable", "because")]
    print(f"{'':>24}", *(f"{name:>20}" for name in names), " source")
    for row in rows:
        values = [row[name] for name in names]
        cells = [
            "-" if v is None else f"{v:.2f}" if n == "score" else f"{100 * v:.1f} %"
            for n, v in zip(names, values, strict=True)
        ]
        print(f"{row['model']:>24}", *(f"{cell:>20}" for cell in cells), "", row["source"])
    if not rows[0]["comparable"]:
        print(f"not comparable: {rows[0]['because']}")
