"""How good a reward model is: is it right on pairs it has not seen, is it as sure as it is right, does it like length?

Rates are over held-out images, whose answers no reward model was trained on; intervals resample images, for what
belongs to one image is not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlaifv.evaluation.bootstrap import RESAMPLES, percentile_interval

BINS = 5
"""Of `calibration`: the reward model's confidences from 0.5 to 1."""


@dataclass(frozen=True)
class ScoredPair:
    """The rewards of both answers of a held-out preference; `kind` is the preference's."""

    id: str
    image: str
    kind: str
    chosen: float
    rejected: float


@dataclass(frozen=True)
class ScoredAnswers:
    """Rewards of several answers to one question, how many tokens each has, and, where the truth is known, how many
    false claims it makes."""

    image: str
    rewards: Sequence[float]
    tokens: Sequence[int]
    false_claims: Sequence[int] | None = None


def drawn(images: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's image [rows], and how often each image is in a bootstrap sample, [1 + resamples, images]
    with every image once first."""
    names, number = np.unique(images, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return number, np.concatenate([np.ones((1, len(names))), counts])


def share(values: Sequence[float], images: Sequence[str], of: Sequence[float] | None = None) -> dict[str, object]:
    """The mean of values (or their sum over that of `of`), with its 95 % interval over images."""
    number, weights = drawn(images)
    top, below = (np.bincount(number, weights=np.asarray(v, float)) for v in (values, of or np.ones(len(values))))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (weights @ top) / (weights @ below)
    return {"value": float(ratios[0]), "interval": percentile_interval(ratios[1:]), "n": len(values)}


def accuracy(pairs: Sequence[ScoredPair]) -> dict[str, object]:
    """Share of pairs whose chosen answer has the higher reward (a tie is wrong), overall and by kind, and calibration.

    Raises ValueError without pairs.
    """
    if not pairs:
        raise ValueError("no held-out pair to measure a reward model on: raise reward_model.held_out")
    kinds = sorted({pair.kind for pair in pairs})
    by_kind = {kind: _right([pair for pair in pairs if pair.kind == kind]) for kind in kinds}
    return {**_right(pairs), "by_kind": by_kind, "calibration": calibration(pairs)}


def _right(pairs: Sequence[ScoredPair]) -> dict[str, object]:
    return share([pair.chosen > pair.rejected for pair in pairs], [pair.image for pair in pairs])


def calibration(pairs: Sequence[ScoredPair]) -> dict[str, object]:
    """How sure the reward model is against how often it is right.

    Its confidence in what it prefers is σ(|r_1 - r_0|), the probability that its loss is made of. `bins` have equal
    widths from 0.5 to 1; `error` is the expected calibration error, the mean over pairs of |right - confidence| in
    their bin.
    """
    gaps = np.array([pair.chosen - pair.rejected for pair in pairs])
    confidence, right = 1 / (1 + np.exp(-np.abs(gaps))), gaps > 0
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {"confidence": float(confidence[inside].mean()), "right": float(right[inside].mean()), "n": int(inside.sum())}
        for inside in (place == number for number in range(BINS))
        if inside.any()
    ]
    error = sum(row["n"] * abs(row["right"] - row["confidence"]) for row in bins) / len(pairs)
    return {"bins": bins, "error": float(error)}


def length_correlation(answers: Sequence[ScoredAnswers]) -> dict[str, object]:
    """Pearson's correlation of an answer's reward with its length in tokens, both less their means over the answers to
    the same question (a question that asks for more is no taste); 0 where neither varies."""
    number, weights = drawn([item.image for item in answers])
    products = np.zeros((3, weights.shape[1]))
    for place, item in zip(number, answers, strict=True):
        reward, tokens = (np.asarray(v, float) - np.mean(v) for v in (item.rewards, item.tokens))
        products[:, place] += reward @ tokens, reward @ reward, tokens @ tokens
    both, of_reward, of_tokens = products @ weights.T
    values = both / np.sqrt(np.maximum(of_reward * of_tokens, 1e-12))
    return {"value": float(values[0]), "interval": percentile_interval(values[1:]), "n": len(answers)}


def best_of_n(answers: Sequence[ScoredAnswers]) -> dict[str, dict[str, object]]:
    """What choosing each question's answer with the highest reward gives, against an average answer: the share with a
    false claim (where that is known) and the tokens."""
    images = [item.image for item in answers]
    best = [int(np.argmax(item.rewards)) for item in answers]
    found = {
        "tokens": share([item.tokens[i] for item, i in zip(answers, best, strict=True)], images),
        "tokens_of_all": share([float(np.mean(item.tokens)) for item in answers], images),
    }
    if all(item.false_claims is not None for item in answers):
        wrong = [np.asarray(item.false_claims) > 0 for item in answers]
        found["error"] = share([row[i] for row, i in zip(wrong, best, strict=True)], images)
        found["error_of_all"] = share([float(row.mean()) for row in wrong], images)
    return found
