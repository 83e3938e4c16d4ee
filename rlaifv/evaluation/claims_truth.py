"""How well rates judged by claims follow the true ones, in the embedded world, where the truth is known."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlaifv.evaluation.feedback_truth import interval

Truth = Callable[[str, str], int]
"""How many claims of an answer to the image at a path are false (`feedback_truth.known_truth`)."""


def compare_rates(judged: Sequence[Mapping], truth: Truth) -> dict[str, object]:
    """The share of answers with a rejected claim (`by_claims`), of those with a false one (`true`), and `difference`,
    the first less the second, each with its 95 % interval over images. `judged` are rows of `claims.judge_answers`; an
    answer without claims has no rejected one."""
    images = [row["image"] for row in judged]
    rejected = np.array([any(c["p_yes"] <= c["p_no"] for c in row["claims"]) for row in judged], float)
    false = np.array([truth(row["image"], row["answer"]) > 0 for row in judged], float)
    found: dict[str, object] = {"n": len(judged)}
    for name, values in (("by_claims", rejected), ("true", false), ("difference", rejected - false)):
        found |= {name: float(values.mean()), f"{name}_interval": interval(values, images)}
    return found


def true_rates(checkpoints: Sequence[Mapping], truth: Truth) -> dict[str, float]:
    """Checkpoint → its share of answers with a false claim; rows of `checkpoint` and its `answers`."""
    return {
        row["checkpoint"]: float(np.mean([truth(a["image"], a["answer"]) > 0 for a in row["answers"]]))
        for row in checkpoints
    }


def compare_choices(by_claims: str, by_annotations: str, rates: Mapping[str, float]) -> dict[str, object]:
    """The checkpoints that dev chooses by claims and by annotations, and the true rate of each on dev."""
    chosen = {"by_claims": by_claims, "by_annotations": by_annotations}
    return chosen | {f"true_{name}": rates[checkpoint] for name, checkpoint in chosen.items()}
