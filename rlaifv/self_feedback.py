"""Best-of-N at inference time: what choosing by the model's own reward does to hallucination and recall.

The candidates of the largest N are sampled and scored once. A curve then draws, with many seeds, the first N of a
random order of every instruction's candidates and lets each method choose one of them:

- normalized: the highest r(y) = β/|y| (log π_θ − log π_ref) (RLAIF-V, section 2.4); β does not change the choice
- summed: the same without 1/|y|
- random: the first, whatever N is
- oracle: the fewest hallucinated objects, then the most covered ones: what a perfect judge would reach
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlaifv.benchmarks import chair
from rlaifv.benchmarks.results import Answer
from rlaifv.benchmarks.statistics import percentile_interval
from rlaifv.evaluate import Split
from rlaifv.records import RATES, Candidate
from rlaifv.rewards import CandidateLogps

METHODS = ("normalized", "summed", "random", "oracle")
MEASURES = (*RATES, "mean_words")


@dataclass(frozen=True)
class Pool:
    """What each of S candidates to each of I instructions says, and what it is worth. All arrays but `truth` (I,) are
    (I, S): counts of distinct mentions, of hallucinated ones and of covered classes, words, and the log-ratio
    log π_θ − log π_ref with the number of its tokens."""

    mentions: np.ndarray
    hallucinated: np.ndarray
    covered: np.ndarray
    words: np.ndarray
    truth: np.ndarray
    log_ratio: np.ndarray
    tokens: np.ndarray

    def value(self, method: str) -> np.ndarray:
        """(I, S) numbers of which `method` takes the highest; for "random" they are all equal: the first is taken."""
        if method == "normalized":
            return self.log_ratio / self.tokens
        if method == "summed":
            return self.log_ratio
        if method == "oracle":
            return self.covered - 1000.0 * self.hallucinated
        return np.zeros(self.mentions.shape)


def make_pool(
    candidates: Sequence[Candidate], logps: Sequence[CandidateLogps], split: Split, size: int
) -> tuple[Pool, int]:
    """Count what every candidate says; returns the pool, and how many instructions had fewer than `size` candidates.

    Those few (an empty answer, an unreadable image) are left out: they could not be sub-sampled like the others.
    """
    scored = {row.candidate_id: row for row in logps}
    of_instruction: dict[str, list[Candidate]] = {i.id: [] for i in split.instructions}
    for candidate in candidates:
        if candidate.id in scored:
            of_instruction[candidate.instruction_id].append(candidate)
    asked = {candidate.instruction_id for candidate in candidates}
    whole = {key: group[:size] for key, group in of_instruction.items() if len(group) >= size}
    if not whole:
        raise ValueError(f"no instruction has {size} scored candidates: lower self_feedback.candidates")
    image = {i.id: split.image_ids[i.image_path.rsplit("/", 1)[-1]] for i in split.instructions}
    distinct = {(key, c.answer): None for key, group in whole.items() for c in group}
    answers = [Answer(str(n), text, image=image[key]) for n, (key, text) in enumerate(distinct)]
    scores = chair.score(answers, split.objects, counting="unique")
    if scores.missing:
        raise ValueError(f"{len(scores.missing)} answers cannot be scored, first: {scores.missing[0]}")
    row_of = dict(zip(distinct, scores.rows, strict=True))
    rows = [[row_of[key, c.answer] for c in group] for key, group in whole.items()]
    values = [[scored[c.id] for c in group] for group in whole.values()]
    pool = Pool(
        mentions=np.array([[len(r["mentions"]) for r in group] for group in rows]),
        hallucinated=np.array([[len(r["hallucinated"]) for r in group] for group in rows]),
        covered=np.array([[len(r["covered"]) for r in group] for group in rows]),
        words=np.array([[r["words"] for r in group] for group in rows]),
        truth=np.array([len(group[0]["truth"]) for group in rows]),
        log_ratio=np.array([[v.policy_logp - v.reference_logp for v in group] for group in values]),
        tokens=np.array([[v.tokens for v in group] for group in values]),
    )
    return pool, len(asked) - len(whole)


def sizes(candidates: int) -> list[int]:
    """1, 2, 4, … up to `candidates`."""
    return [1 << k for k in range(candidates.bit_length()) if 1 << k <= candidates]


def rates_of(pool: Pool, chosen: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """The rates of one chosen candidate (I,) per instruction, over instructions `rows` (repeats allowed)."""
    at = (rows, chosen[rows])
    wrong, mentions = pool.hallucinated[at], pool.mentions[at]
    return {
        "response_hallucination": (wrong > 0).sum() / max((mentions > 0).sum(), 1),
        "mention_hallucination": wrong.sum() / max(mentions.sum(), 1),
        "recall": pool.covered[at].sum() / max(pool.truth[rows].sum(), 1),
        "mean_words": pool.words[at].mean(),
    }


def draw(pool: Pool, seeds: int) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Rates of every (method, N) with every seed: for each rate (seeds, 2), over all instructions and a resample.

    The candidates of a seed are the same for all methods and nested over N, so methods can be compared seed by seed.
    """
    count, size = pool.mentions.shape
    drawn: dict[tuple[str, int], dict[str, np.ndarray]] = {
        (method, n): {rate: np.empty((seeds, 2)) for rate in MEASURES} for method in METHODS for n in sizes(size)
    }
    values = {method: pool.value(method) for method in METHODS}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        order = rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)
        resample = rng.integers(count, size=count)
        for (method, n), rates in drawn.items():
            best = np.take_along_axis(values[method], order[:, :n], 1).argmax(1)
            chosen = order[np.arange(count), best]
            for column, rows in enumerate((np.arange(count), resample)):
                for rate, value in rates_of(pool, chosen, rows).items():
                    rates[rate][seed, column] = value
    return drawn


def curve(pool: Pool, seeds: int) -> list[dict]:
    """One row per method and N: `method`, `n`, and for every rate its mean over seeds and its 95 % interval.

    The interval covers both which candidates are drawn and which images are asked about (instructions resampled).
    """
    rows = []
    for (method, n), rates in draw(pool, seeds).items():
        row: dict[str, object] = {"method": method, "n": n}
        for rate, values in rates.items():
            row[rate] = float(values[:, 0].mean())
            row[f"{rate}_interval"] = percentile_interval(values[:, 1])
        rows.append(row)
    return rows


def compare(pool: Pool, seeds: int, n: int) -> dict[str, object]:
    """Best of `n` by the normalized reward against one random answer and against the summed reward, seed by seed.

    `relative_reduction` is 1 − response hallucination / that of a random answer; `recall_change` and the two
    `against_summed` are differences of rates (negative hallucination and positive recall are better).
    """
    drawn = draw(pool, seeds)
    ours, one, other = drawn["normalized", n], drawn["random", n], drawn["summed", n]
    response, recall = "response_hallucination", "recall"
    # a ratio of means; a resample (column 1) in which no random answer hallucinates has no ratio
    mean = one[response][:, 0].mean()
    resampled = one[response][:, 1]
    reductions = 1 - ours[response][resampled > 0, 1] / resampled[resampled > 0]
    result: dict[str, object] = {
        "n": n,
        "relative_reduction": float(1 - ours[response][:, 0].mean() / mean) if mean else 0.0,
        "relative_reduction_interval": percentile_interval(reductions),
    }
    for name, values in {
        "recall_change": ours[recall] - one[recall],
        "hallucination_against_summed": ours[response] - other[response],
        "recall_against_summed": ours[recall] - other[recall],
    }.items():
        result[name] = float(values[:, 0].mean())
        result[f"{name}_interval"] = percentile_interval(values[:, 1])
    return result
