"""What every scorer returns: rates that are ratios of sums over rows, so one bootstrap fits all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scores:
    """The result of a scorer.

    Attributes:
        benchmark: its name.
        rows: one dict a scored answer, with "id" and everything that the rates count.
        rates: name → (numerators, denominators), one number a row each; the rate is Σ numerator / Σ
            denominator.
        counts: plain numbers beside the rates ("n": rows scored).
        settings: how it was scored (vocabulary, nouns, judge, protocol), for the reader of a report.
        missing: what could not be scored, [{"id", "reason"}]; never part of a rate.
        means: the rates that are means of numbers (words, points) and no shares.
        drawn_by: the field of a row whose equal values an interval draws together ("image": several answers to one
            image are not independent).
    """

    benchmark: str
    rows: Sequence[Mapping[str, Any]]
    rates: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    counts: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[Mapping[str, Any]] = ()
    means: Sequence[str] = ("mean_words",)
    drawn_by: str = "id"

    @property
    def metrics(self) -> dict[str, float]:
        """Every rate as a number, and the counts. A rate with nothing to count is 0 (see the counts)."""
        return {name: ratio(*sums) for name, sums in self.rates.items()} | dict(self.counts)

    def report(self) -> dict[str, Any]:
        """Metrics, settings and what is missing: what a command prints as JSON."""
        return {"benchmark": self.benchmark, **self.metrics, **self.settings, "missing": list(self.missing)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Σ numerators / Σ denominators, 0.0 when there is nothing to count."""
    total = sum(denominators)
    return sum(numerators) / total if total else 0.0
