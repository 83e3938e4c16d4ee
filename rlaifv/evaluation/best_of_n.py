"""Best-of-N at inference time: what choosing by the model's own reward does to hallucination and recall.

The candidates of the largest N are sampled and scored once. For a smaller N, every N of an instruction's candidates are
as likely as any others, and each method chooses one of them:

- normalized: the highest r(y) = β/|y| (log π_θ − log π_ref) (RLAIF-V, section 2.4); β does not change the choice
- summed: the same without 1/|y|
- random: any
- oracle: the fewest hallucinated objects, then the most covered ones: what a perfect judge would reach
- reward_model: the highest score of a learned reward model (Fact-RLHF), where candidates have one

Rates are expectations over all draws of N, computed exactly, not by drawing; their intervals are over instructions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rlaifv.evaluation.bootstrap import percentile_interval
from rlaifv.evaluation.hallucination import Split, score_answers
from rlaifv.records import RATES, Candidate
from rlaifv.steps.self_feedback import CandidateLogps, CandidateScore

METHODS = ("normalized", "summed", "random", "oracle")
MEASURES = (*RATES, "mean_words")


@dataclass(frozen=True)
class Pool:
    """What each of S candidates to each of I instructions says, and what it is worth. All arrays but `truth` (I,) are
    (I, S): counts of distinct mentions, of hallucinated ones and of covered classes, words, and the log-ratio
    log π_θ − log π_ref with the number of its tokens. `ids` names the instructions; `score` is a reward model's, None
    where none was asked."""

    ids: tuple[str, ...]
    mentions: np.ndarray
    hallucinated: np.ndarray
    covered: np.ndarray
    words: np.ndarray
    truth: np.ndarray
    log_ratio: np.ndarray
    tokens: np.ndarray
    score: np.ndarray | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """What chooses among these candidates."""
        return METHODS if self.score is None else (*METHODS, "reward_model")

    def value(self, method: str) -> np.ndarray:
        """(I, S) numbers of which `method` takes the highest; for "random" they are all equal."""
        if method == "normalized":
            return self.log_ratio / self.tokens
        if method == "summed":
            return self.log_ratio
        if method == "reward_model":
            return self.score
        if method == "oracle":
            return self.covered - 1000.0 * self.hallucinated
        return np.zeros(self.mentions.shape)


def make_pool(
    candidates: Sequence[Candidate],
    logps: Sequence[CandidateLogps],
    split: Split,
    size: int,
    scores: Sequence[CandidateScore] | None = None,
) -> tuple[Pool, int]:
    """Count what every candidate says; returns the pool, and how many instructions had fewer than `size` candidates.
    `scores` are a reward model's.

    Those few (an empty answer, an unreadable image) are left out: they could not be sub-sampled like the others.
    """
    scored = {row.candidate_id: row for row in logps}
    learned = scores and {row.candidate_id: row.reward for row in scores}
    if not split.annotated:
        raise ValueError(f"best-of-N is measured against annotations, which {split.name} has not (instances: null)")
    of_instruction: dict[str, list[Candidate]] = {i.id: [] for i in split.instructions}
    for candidate in candidates:
        if candidate.id in scored and (learned is None or candidate.id in learned):
            of_instruction[candidate.instruction_id].append(candidate)
    asked = {candidate.instruction_id for candidate in candidates}
    whole = {key: group[:size] for key, group in of_instruction.items() if len(group) >= size}
    if not whole:
        raise ValueError(f"no instruction has {size} scored candidates: lower self_feedback.candidates")
    image = {i.id: i.image_path for i in split.instructions}
    kept = [c for group in whole.values() for c in group]
    answers = [{"id": c.id, "answer": c.answer, "image": image[c.instruction_id]} for c in kept]
    table = pd.DataFrame(score_answers(answers, split).rows)
    values = pd.DataFrame([scored[c.id] for c in kept])
    shape = len(whole), size
    pool = Pool(
        ids=tuple(whole),
        **{name: table[name].str.len().to_numpy().reshape(shape) for name in ("mentions", "hallucinated", "covered")},
        words=table.words.to_numpy().reshape(shape),
        truth=table.truth.str.len().to_numpy()[::size],
        log_ratio=(values.policy_logp - values.reference_logp).to_numpy().reshape(shape),
        tokens=values.tokens.to_numpy().reshape(shape),
        score=None if learned is None else np.array([learned[c.id] for c in kept]).reshape(shape),
    )
    return pool, len(asked) - len(whole)


def sizes(candidates: int) -> list[int]:
    """1, 2, 4, … up to `candidates`."""
    return [1 << k for k in range(candidates.bit_length()) if 1 << k <= candidates]


def chances(values: np.ndarray, n: int) -> np.ndarray:
    """Probability (I, S) that a candidate is the one of highest `values` (I, S) among `n` drawn without replacement.

    Equal values share theirs. With k of the S values at most v, the highest of n is at most v with C(k, n) / C(S, n).
    """
    size = values.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"cannot draw {n} of {size} candidates")
    below = (values[:, None, :] < values[:, :, None]).sum(-1)
    equal = (values[:, None, :] == values[:, :, None]).sum(-1)
    up_to = np.array([math.comb(k, n) / math.comb(size, n) for k in range(size + 1)])
    return (up_to[below + equal] - up_to[below]) / equal


def expected_rates(pool: Pool, method: str, n: int, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Rates (R,) of the best of `n` by `method`, each over the instructions with one row of `weights` (R, I)."""
    chance = chances(pool.value(method), n)

    def expected(what: np.ndarray) -> np.ndarray:
        return weights @ (chance * what).sum(1)

    mentions, truth = expected(pool.mentions), weights @ pool.truth
    return {
        "response_hallucination": expected(pool.hallucinated > 0) / np.maximum(expected(pool.mentions > 0), 1e-12),
        "mention_hallucination": expected(pool.hallucinated) / np.maximum(mentions, 1e-12),
        "recall": expected(pool.covered) / np.maximum(truth, 1),
        "mean_words": expected(pool.words) / weights.sum(1),
    }


def resample(pool: Pool, resamples: int) -> np.ndarray:
    """Weights (1 + resamples, I): every instruction once, then how often each is in a bootstrap sample of them.

    The same for all methods and every N, so that what is compared is compared on the same images.
    """
    count = len(pool.truth)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), drawn])  # as floats, which multiply fast


def curve(pool: Pool, weights: np.ndarray) -> list[dict]:
    """One row per method and N: `method`, `n`, and for every rate its value and its 95 % interval over `resample`'s
    `weights`.

    The interval says how the rate would vary with other images and other answers to them: an instruction and its
    candidates are resampled together.
    """
    rows = []
    for method in pool.methods:
        for n in sizes(pool.mentions.shape[1]):
            rows.append({"method": method, "n": n} | _with_intervals(expected_rates(pool, method, n, weights)))
    return rows


def _with_intervals(resampled: Mapping[str, np.ndarray]) -> dict[str, object]:
    """Of (1 + resamples,) numbers by name: the first, and the 95 % interval of the others."""
    found: dict[str, object] = {}
    for name, values in resampled.items():
        found |= {name: float(np.nan_to_num(values[0])), f"{name}_interval": percentile_interval(values[1:])}
    return found


def choice_gains(pool: Pool, weights: np.ndarray, n: int) -> dict[str, object]:
    """Best of `n` by the normalized reward against a random answer and against the summed reward, on the same images.

    `relative_reduction` is 1 − response hallucination / that of a random answer; `recall_change` and the two
    `against_summed` are differences of rates (negative hallucination and positive recall are better).
    """
    ours, one, other = (expected_rates(pool, method, n, weights) for method in ("normalized", "random", "summed"))
    response, recall = "response_hallucination", "recall"
    # a resample in which no answer hallucinates has no ratio
    reduction = np.full(len(weights), np.nan)
    np.divide(ours[response], one[response], out=reduction, where=one[response] > 0)
    changes = {
        "relative_reduction": 1 - reduction,
        "recall_change": ours[recall] - one[recall],
        "hallucination_against_summed": ours[response] - other[response],
        "recall_against_summed": ours[recall] - other[recall],
    }
    return {"n": n} | _with_intervals(changes)
