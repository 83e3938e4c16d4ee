"""The rewards of reinforcement learning from claims: pure functions of an answer and of what judges said of it.

A reward of None says that it does not apply: an answer that the divider could not split has no verdicts, an
instruction without reference has no facts. `neutral` keeps such an answer out of what the others are compared with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from rlaifv.evaluation.nouns import noun_forms, tokenize

IDLE = frozenset(("a", "an", "the", "this", "that", "it", "its", "is", "are", "was", "be", "there", "and", "in", "on"))
IDLE |= {"at", "of", "to", "image", "picture", "photo", "scene"}
"""Words that tell no claim from another."""


@dataclass(frozen=True)
class Judged:
    """An answer with all that rewards look at.

    `tokens` counts the answer's without its end token, `usual` is the mean of the base model's answers to the same
    instruction; `finished` says that it ended itself and was not cut. `claims` are the divider's, None where it gave no
    usable list, and `accepted` the labeler's verdicts on those that could be asked. `facts` are the claims of the
    reference texts, None where there are none; `gold` is the right answer to a question that has one; `score` a reward
    model's.
    """

    text: str
    tokens: int
    finished: bool
    usual: float
    claims: tuple[str, ...] | None = None
    accepted: tuple[bool, ...] = ()
    facts: tuple[str, ...] | None = None
    gold: str = ""
    score: float | None = None


def claims(answer: Judged) -> float | None:
    """Minus the number of rejected claims: RLAIF-V's score of an answer (arXiv 2405.17220, section 2.2).

    None for an answer without a judged claim: with 0, the best there is, it would pay to say nothing that can be
    checked.
    """
    return -float(answer.accepted.count(False)) if answer.accepted else None


def recall(answer: Judged) -> float | None:
    """The share of the facts that the answer states; None without facts, or where the answer could not be split."""
    if not answer.facts or answer.claims is None:
        return None
    return fmean(stated(fact, answer.claims) for fact in answer.facts)


def length(answer: Judged) -> float:
    """Minus the share by which the answer is longer or shorter than the base model's to the same instruction."""
    return -abs(answer.tokens / answer.usual - 1)


def stop(answer: Judged) -> float:
    """-1 for an answer that was cut at its token limit, else 0 (Fact-RLHF, arXiv 2309.14525, gives -8)."""
    return 0.0 if answer.finished else -1.0


def correct(answer: Judged) -> float | None:
    """Fact-RLHF's bonus for a right answer, as its released code has it; None for a question without one.

    To a question of several choices it is 1 where the answer names the right one, else 0. Where "no" is right, the
    answer's first word gives 0.5 for "no" and -0.5 for "yes"; where "yes" is, 0 whatever is said: models say it anyway.
    """
    gold = answer.gold.strip().lower().rstrip(".")
    if not gold:
        return None
    said = answer.text.lower()
    first = next(iter(tokenize(said)), "")
    if gold in ("yes", "no"):
        return 0.0 if gold == "yes" else {"no": 0.5, "yes": -0.5}.get(first, 0.0)
    return float(f" {' '.join(tokenize(gold))} " in f" {' '.join(tokenize(said))} ")


def reward_model(answer: Judged) -> float | None:
    """The score of a learned reward model; None where there is no such model."""
    return answer.score


REWARDS: dict[str, Callable[[Judged], float | None]] = {
    function.__name__: function for function in (claims, recall, length, stop, correct, reward_model)
}
"""The keys of the weights in params.yaml → what they weigh."""


def neutral(values: Sequence[float | None], group: int) -> list[float | None]:
    """The rewards of several groups of `group` answers, with the mean of the group's others in place of a None; a group
    of nothing else stays as it is.

    An answer's advantage is its reward minus the mean of its group's others. TRL leaves an answer out of that only
    where *all* its rewards are None, and otherwise counts one as 0, which for `claims` is the best there is. At the
    mean it has no advantage, and with m of n known the others have those among themselves times n(m - 1) / (m(n - 1)).
    """
    filled: list[float | None] = []
    for start in range(0, len(values), group):
        part = values[start : start + group]
        known = [value for value in part if value is not None]
        filled += [fmean(known) if value is None and known else value for value in part]
    return filled


def stated(fact: str, said: Sequence[str]) -> bool:
    """Whether one claim has all the words of a fact, nouns in singular or plural: it says the same, or more.

    A comparison of words finds the claims of one divider again; it misses what is said in other words.
    """
    return any(content(fact) <= content(claim) for claim in said)


@lru_cache(maxsize=1 << 16)
def content(text: str) -> frozenset[str]:
    """The words of a claim that tell it from others, nouns in their base form."""
    words = [word for word in tokenize(text) if any(c.isalnum() for c in word) and word not in IDLE]
    return frozenset(next(iter(noun_forms(word)), word) for word in words)
