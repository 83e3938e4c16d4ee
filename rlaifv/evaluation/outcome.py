"""Outcome: what a finished run came to, by iteration, in one small file that `dvc exp show` and the report compare.

Rates are fractions of the test split with 95 % bootstrap intervals. In the embedded world the truth is known, and
feedback itself is scored: are the labeler's judgements right, is the chosen answer of a pair really the better one?
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rlaifv.evaluation.feedback_truth import score_iteration
from rlaifv.params import Params
from rlaifv.records import RATES, ModelRecord
from rlaifv.results import Result

SHOWN = (*RATES, *(f"{rate}_interval" for rate in RATES), "mean_words", "n")
TRUTH = {"claim_accuracy": ("claims", "accuracy"), "pair_agreement": ("pairs", "agreement")}
"""Our names of what truth tells of feedback → where `score_iteration` has it."""
WORDS = ("mean_words_chosen", "mean_words_rejected")
NEEDED = ("test", "pairs", "selection", "dev")
"""The parts of an iteration's `Result` that an outcome is made of; of the base only "test"."""


def score_run(results: Mapping[str, Result], iterations: Path, prepared: Path, instances: Path) -> dict[str, dict]:
    """The base and every iteration: test rates, pairs, the chosen and the last checkpoint, and feedback against truth.

    Args:
        results: by iteration in order, "0" the base; `NEEDED` of their parts are looked at.
        iterations, prepared: `data/iterations` and `data/prepared` of the run.
        instances: what the train images show (the embedded world's instances_train.json); where there is no such
            file the truth is unknown, and nothing is said of it.
    """
    rows: dict[str, dict] = {name: {key: result.test[key] for key in SHOWN} for name, result in results.items()}
    base = rows.pop("0")
    for name, row in rows.items():
        result, last = results[name], results[name].dev[-1]
        row["pairs"] = {"n": result.pairs["pairs"], **{key: result.pairs[key] for key in WORDS}}
        # the last checkpoint: what training came to before the selection, which refuses checkpoints that say less
        row["training"] = {"chosen": result.selection["checkpoint"], "last": last["checkpoint"]}
        row["training"] |= {f"last_{rate}": last[rate] for rate in RATES}
        scored = score_iteration(iterations / name, prepared, instances) if instances.is_file() else {}
        for shown, (part, rate) in TRUTH.items():
            if rate in scored.get(part, ()):  # without claims or pairs there is nothing to say
                row |= {shown: scored[part][rate], f"{shown}_interval": scored[part][f"{rate}_interval"]}
    return {"base": base, "rounds": rows}


def flat_rows(experiments: Iterable[Mapping]) -> list[dict[str, object]]:
    """One row per experiment and iteration (0: the base model), for a CSV file; an unknown number is empty."""
    rows = []
    for experiment in experiments:
        for iteration, found in {"0": experiment["base"], **experiment["rounds"]}.items():
            row: dict[str, object] = {"experiment": experiment["name"], "iteration": iteration}
            for rate in (*RATES, *TRUTH):
                low, high = found.get(f"{rate}_interval", ("", ""))
                row |= {rate: found.get(rate, ""), f"{rate}_low": low, f"{rate}_high": high}
            pairs = {f"pairs_{key}": found.get("pairs", {}).get(key, "") for key in ("n", *WORDS)}
            rows.append({**row, "mean_words": found["mean_words"], **pairs})
    return rows


SETTINGS = {
    "world": ("train", "test"),
    "prepare": ("per_iteration",),
    "generate": ("samples", "temperature"),
    "pairs": ("min_gap", "max_per_instruction"),
    "train": ("beta", "learning_rate", "epochs"),
    "select": ("max_recall_drop",),
}
"""The parameters that a reader of the results wants to know."""


def describe_inputs(params: Params, models: Mapping[str, ModelRecord]) -> dict[str, dict]:
    """What results came from: the three models, and the settings without an experiment's overrides (of `params` only
    the seed and what `SETTINGS` names are read)."""
    settings = {f"{s}.{key}": getattr(getattr(params, s), key) for s, keys in SETTINGS.items() for key in keys}
    return {
        "models": {role: {"path": r.path, "fingerprint": r.fingerprint} for role, r in models.items()},
        "settings": {"seed": params.seed, **settings},
    }


def read_results(path: Path) -> dict:
    """A group's results; no experiments when none were run yet."""
    return json.loads(path.read_text()) if path.is_file() else {"experiments": [], "tests": {}, "failed": []}
