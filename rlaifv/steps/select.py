"""Select: the checkpoint that hallucinates least on dev and still says what it sees; test is only looked at after."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlaifv.records import rates_of
from rlaifv.store import link_or_copy

log = logging.getLogger(__name__)


def least(base: Mapping, max_recall_drop: float) -> float:
    """The recall that a checkpoint must keep, `max_recall_drop` below the base model's; of rows judged by claims, the
    accepted claims an answer, that share below."""
    *_, said = rates_of(base)
    return base[said] - max_recall_drop * (1 if said == "recall" else base[said])


def keeps_recall(row: Mapping, base: Mapping, max_recall_drop: float) -> bool:
    """Whether a dev row keeps what the base model says (`least`)."""
    return row[rates_of(base)[2]] >= least(base, max_recall_drop)


def choose(rows: Sequence[dict], base: dict, max_recall_drop: float) -> dict:
    """The dev row with the lowest response hallucination among those whose recall is at most `max_recall_drop`
    below the base model's; ties go to the higher recall, then to the earlier checkpoint. Of rows judged by claims it is
    the lowest share of answers with a rejected claim among those that keep the accepted ones.

    Hallucination without recall is no result: a model that says nothing never hallucinates. When no checkpoint keeps
    enough recall, the one with the highest recall is taken, with a warning.
    """
    if not rows:
        raise ValueError("no checkpoint to choose from")
    best = ranked(rows, base, max_recall_drop)[0]
    if not keeps_recall(best, base, max_recall_drop):
        *_, said = rates_of(base)
        log.warning(
            f"no checkpoint keeps {said.replace('_', ' ')} within {max_recall_drop:.3f} of the base's "
            f"{base[said]:.3f}; taking {best['checkpoint']} with the highest, {best[said]:.3f}"
        )
    return best


def ranked(rows: Sequence[dict], base: dict, max_recall_drop: float) -> list[dict]:
    """The dev rows, best first, by the rule of `choose`. A row's place among others depends on no further row: the best
    of all is always among the best few of those known so far."""

    wrong, _, said = rates_of(base)

    def place(row: dict) -> tuple:
        if keeps_recall(row, base, max_recall_drop):
            return (0, row[wrong], -row[said])
        return (1, -row[said], 0.0)

    return sorted(rows, key=place)  # stable: the earlier checkpoint first


def copy_checkpoint(checkpoint: Path, policy: Path) -> None:
    """Give the chosen checkpoint's files a second name where the next iteration looks for its policy: all or none."""
    partial = policy.with_name(policy.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, copy_function=link_or_copy)
    shutil.rmtree(policy, ignore_errors=True)
    partial.rename(policy)
