"""Select: the checkpoint that hallucinates least on dev and still says what it sees; test is only looked at after."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlaifv.store import link_or_copy

log = logging.getLogger(__name__)


def keeps_recall(row: Mapping, base: Mapping, max_recall_drop: float) -> bool:
    """Whether a dev row's recall is at most `max_recall_drop` below the base model's."""
    return row["recall"] >= base["recall"] - max_recall_drop


def choose(rows: Sequence[dict], base: dict, max_recall_drop: float) -> dict:
    """The dev row with the lowest response hallucination among those whose recall is at most `max_recall_drop`
    below the base model's; ties go to the higher recall, then to the earlier checkpoint.

    Hallucination without recall is no result: a model that says nothing never hallucinates. When no checkpoint keeps
    enough recall, the one with the highest recall is taken, with a warning.
    """
    if not rows:
        raise ValueError("no checkpoint to choose from")
    best = ranked(rows, base, max_recall_drop)[0]
    if not keeps_recall(best, base, max_recall_drop):
        log.warning(
            f"no checkpoint keeps recall within {max_recall_drop:.3f} of the base's {base['recall']:.3f}; "
            f"taking {best['checkpoint']} with the highest, {best['recall']:.3f}"
        )
    return best


def ranked(rows: Sequence[dict], base: dict, max_recall_drop: float) -> list[dict]:
    """The dev rows, best first, by the rule of `choose`. A row's place among others depends on no further row: the best
    of all is always among the best few of those known so far."""

    def place(row: dict) -> tuple:
        if keeps_recall(row, base, max_recall_drop):
            return (0, row["response_hallucination"], -row["recall"])
        return (1, -row["recall"], 0.0)

    return sorted(rows, key=place)  # stable: the earlier checkpoint first


def copy_checkpoint(checkpoint: Path, policy: Path) -> None:
    """Give the chosen checkpoint's files a second name where the next iteration looks for its policy: all or none."""
    partial = policy.with_name(policy.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, copy_function=link_or_copy)
    shutil.rmtree(policy, ignore_errors=True)
    partial.rename(policy)
