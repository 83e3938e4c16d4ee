"""Select: the checkpoint that hallucinates least on dev and still says what it sees; test is only looked at after."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    kept = [row for row in rows if keeps_recall(row, base, max_recall_drop)]
    if not kept:
        best = max(rows, key=lambda row: row["recall"])
        log.warning(
            f"no checkpoint keeps recall within {max_recall_drop:.3f} of the base's {base['recall']:.3f}; "
            f"taking {best['checkpoint']} with the highest, {best['recall']:.3f}"
        )
        return best
    return min(kept, key=lambda row: (row["response_hallucination"], -row["recall"], row["checkpoint"]))


def copy_checkpoint(checkpoint: Path, policy: Path) -> None:
    """Copy the chosen checkpoint to where the next iteration looks for its policy, whole or not at all."""
    partial = policy.with_name(policy.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial)
    shutil.rmtree(policy, ignore_errors=True)
    partial.rename(policy)
