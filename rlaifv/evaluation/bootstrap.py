"""How sure a rate is: bootstrap intervals, and a paired test between two models on the same rows.

Rows (answers) are resampled, not mentions: mentions of one answer are not independent (`Scores.drawn_by` draws the
answers to one image together as well). All rates of a benchmark are ratios of sums over rows (`Scores.rates`), so the
same two functions serve every one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlaifv.evaluation.scores import Scores, ratio

RESAMPLES = 2000
_CHUNK = 2_000_000  # random row numbers held at once


@dataclass(frozen=True)
class Comparison:
    """Model B against model A on one rate, over the rows that both answered.

    Attributes:
        rate: its name.
        a, b: the rate of each model on the shared rows.
        difference: b − a.
        low, high: 95 % bootstrap interval of the difference.
        p_value: two-sided, from the same resamples as the interval; below 0.05 just when that leaves zero out.
        n: shared rows.
    """

    rate: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    n: int


def intervals(
    scores: Scores, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every rate; the same seed gives the same numbers.

    Returns:
        rate → (low, high); (0, 0) where there is nothing to count.

    Raises:
        ValueError: a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a share between 0 and 1, such as 0.95")
    names = list(scores.rates)
    if not scores.rows:
        return dict.fromkeys(names, (0.0, 0.0))
    sums = np.array([scores.rates[name] for name in names], dtype=float)  # (rates, 2, rows)
    sums = _drawn_together(sums, scores, range(len(scores.rows)))
    drawn = _resampled_ratios(sums, resamples, np.random.default_rng(seed))
    tail = 100 * (1 - level) / 2
    return {name: percentile_interval(drawn[:, i], tail) for i, name in enumerate(names)}


def compare_paired(
    a: Scores, b: Scores, rates: Sequence[str] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> list[Comparison]:
    """Test model B against model A, row by row (paired).

    Args:
        a, b: scores of the same benchmark; rows are paired by their "id".
        rates: default all that both have.

    Returns:
        One Comparison a rate.

    Raises:
        ValueError: no shared rows, or an id that occurs twice within one model's rows.
    """
    place_a, place_b = _places(a, "first"), _places(b, "second")
    shared = [identity for identity in place_a if identity in place_b]
    if not shared:
        raise ValueError(f"no row id in common: {list(place_a)[:3]} … against {list(place_b)[:3]} …")
    rows_a, rows_b = [place_a[i] for i in shared], [place_b[i] for i in shared]
    names = [name for name in (rates or a.rates) if name in a.rates and name in b.rates]
    sums_a = np.array([a.rates[name] for name in names], dtype=float)[:, :, rows_a]
    sums_b = np.array([b.rates[name] for name in names], dtype=float)[:, :, rows_b]
    rng = np.random.default_rng(seed)
    drawn = _resampled_ratios(_drawn_together(np.concatenate([sums_a, sums_b]), a, rows_a), resamples, rng)
    differences = drawn[:, len(names) :] - drawn[:, : len(names)]
    results = []
    for i, name in enumerate(names):
        rate_a, rate_b = ratio(*sums_a[i]), ratio(*sums_b[i])
        low, high = percentile_interval(differences[:, i])
        p_value = _p_value(differences[:, i], rate_b - rate_a)
        results.append(Comparison(name, rate_a, rate_b, rate_b - rate_a, low, high, p_value, len(shared)))
    return results


def percentile_interval(values: np.ndarray, tail: float = 2.5) -> tuple[float, float]:
    """What lies between the lowest and the highest `tail` percent of (n,) resampled values (default: the middle 95 %).
    A nan, which is a ratio of a resample without anything to count, is left out; (0, 0) when nothing remains."""
    values = values[~np.isnan(values)]
    if not len(values):
        return 0.0, 0.0
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _places(scores: Scores, which: str) -> dict[str, int]:
    """Row id → its position."""
    places: dict[str, int] = {}
    for number, row in enumerate(scores.rows):
        if row["id"] in places:
            raise ValueError(f"the {which} model has two rows with the id {row['id']!r}: rows cannot be paired")
        places[row["id"]] = number
    return places


def _drawn_together(sums: np.ndarray, scores: Scores, rows: Sequence[int]) -> np.ndarray:
    """(…, rows) → (…, units): what `scores.drawn_by` draws together added up, of these of its rows."""
    if scores.drawn_by == "id":
        return sums
    units, place = np.unique([scores.rows[row][scores.drawn_by] for row in rows], return_inverse=True)
    together = np.zeros((*sums.shape[:-1], len(units)))
    np.add.at(together, (..., place), sums)
    return together


def _resampled_ratios(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Ratios of sums over rows drawn with replacement. (rates, 2, rows) → (resamples, rates); nan for x/0."""
    n = sums.shape[2]
    flat = sums.reshape(-1, n).T
    drawn = []
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        numbers = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(numbers.ravel(), minlength=size * n).reshape(size, n)
        drawn.append(counts @ flat)
    totals = np.concatenate(drawn).reshape(resamples, -1, 2)
    return _divide(totals[..., 0], totals[..., 1])


def _p_value(differences: np.ndarray, observed: float) -> float:
    """Twice the smaller share of resampled differences on either side of zero, zero itself counted to both: below 0.05
    just when the 95 % interval leaves zero out. (Swapping rows between the models instead would also test how much
    they say, and call one lucky mention among hundreds a difference.)"""
    differences = differences[~np.isnan(differences)]
    if not observed or not len(differences):
        return 1.0
    sides = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())
    return float(min(1.0, 2 * (1 + sides) / (1 + len(differences))))


def _divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators > 0)
