"""Outcome: what a finished run came to, round by round, in one small file that `dvc exp show` and the report compare.

Rates are fractions of the test split with 95 % bootstrap intervals. In the embedded world the truth is known, and
feedback itself is scored: are the labeler's judgements right, is the chosen answer of a pair really the better one?
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rlaifv.evaluation.feedback_truth import score_round
from rlaifv.params import ModelParams, Params
from rlaifv.records import RATES, read_jsonl

SHOWN = (*RATES, *(f"{rate}_interval" for rate in RATES), "mean_words", "n")
TRUTH = {"claim_accuracy": ("claims", "accuracy"), "pair_agreement": ("pairs", "agreement")}
"""Our names of what truth tells of feedback → where `score_round` has it."""
WORDS = ("mean_words_chosen", "mean_words_rejected")


def score_run(
    rounds: Iterable[str], results: Path, iterations: Path, prepared: Path, instances: Path
) -> dict[str, dict]:
    """The base and every round: test rates, pairs, the chosen and the last checkpoint, and feedback against truth.

    Args:
        rounds: their names, in order.
        results, iterations, prepared: `data/results`, `data/iterations` and `data/prepared` of the run.
        instances: what the train images show (the embedded world's instances_train.json); where there is no such
            file the truth is unknown, and nothing is said of it.
    """
    return {
        "base": _test(results / "0"),
        "rounds": {
            name: {
                **_test(results / name),
                "pairs": _pairs(results / name),
                "training": _training(results / name),
                **(_truth(score_round(iterations / name, prepared, instances)) if instances.is_file() else {}),
            }
            for name in rounds
        },
    }


def _test(folder: Path) -> dict[str, object]:
    metrics = json.loads((folder / "test.json").read_text())
    return {key: metrics[key] for key in SHOWN}


def _pairs(folder: Path) -> dict[str, object]:
    statistics = json.loads((folder / "pairs.json").read_text())
    return {"n": statistics["pairs"], **{key: statistics[key] for key in WORDS}}


def _training(folder: Path) -> dict[str, object]:
    """The checkpoint that was chosen, and what the last one does on dev: what training came to before the selection,
    which refuses checkpoints that say less."""
    chosen = json.loads((folder / "selection.json").read_text())["checkpoint"]
    last = read_jsonl(folder / "dev.jsonl")[-1]
    return {"chosen": chosen, "last": last["checkpoint"], **{f"last_{rate}": last[rate] for rate in RATES}}


def _truth(scored: Mapping[str, Mapping]) -> dict[str, object]:
    """Accuracy and agreement with their intervals; without claims or pairs there is nothing to say."""
    found: dict[str, object] = {}
    for name, (part, rate) in TRUTH.items():
        if rate in scored[part]:
            found |= {name: scored[part][rate], f"{name}_interval": scored[part][f"{rate}_interval"]}
    return found


def flat_rows(experiments: Iterable[Mapping]) -> list[dict[str, object]]:
    """One row per experiment and round (0: the base model), for a CSV file; an unknown number is empty."""
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


def fingerprints(params: Params) -> dict[str, str]:
    """Role → fingerprint of its checkpoint's bytes (a served labeler: its address)."""
    from rlaifv.inference.server import is_served
    from rlaifv.vlm.loading import fingerprint_checkpoint

    def of(model: ModelParams) -> str:
        return model.path if is_served(model.path) else fingerprint_checkpoint(model.path, model.revision)

    return {role: of(getattr(params, role)) for role in ("policy", "labeler", "divider")}


def describe_inputs(params: Params) -> dict[str, dict]:
    """What a group's results came from: the three models, and the settings without an experiment's overrides."""
    marks = fingerprints(params)
    models = {role: {"path": getattr(params, role).path, "fingerprint": mark} for role, mark in marks.items()}
    settings = {f"{s}.{key}": getattr(getattr(params, s), key) for s, keys in SETTINGS.items() for key in keys}
    return {"models": models, "settings": {"seed": params.seed, **settings}}


def read_results(path: Path) -> dict:
    """A group's results; no experiments when none were run yet."""
    return json.loads(path.read_text()) if path.is_file() else {"experiments": [], "tests": {}, "failed": []}
