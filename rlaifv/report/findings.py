"""Findings: the report's sections on what is measured beside the pipeline.

`make ablations`, `make rounds`, `make self-feedback`, `make claim-rates`, `make rloo` and `make fact-rlhf` leave small
files in `metrics/`. They may be older than the run that the report is about, so each section says which checkpoints and
settings its numbers are of.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from rlaifv.evaluation.outcome import TRUTH, read_results
from rlaifv.report import plots
from rlaifv.report.render import between, p_value, points, render

TITLES = {"ablations": "Ablations: what each ingredient is worth", "rounds": "More iterations, or more data?"}
"""The groups of experiments/experiments.yaml, and what the report calls them."""


def findings_html(metrics: Path, inputs: Mapping, policy: str) -> Markup:
    """All sections for which there are results.

    Args:
        metrics: the folder of their files.
        inputs: `describe_inputs` of this report's run.
        policy: the fingerprint of its aligned policy.
    """
    base = inputs["models"]["policy"]["fingerprint"]
    names = ("self_feedback", "claim_rates", "fact_rlhf", "reward_best_of_n", "rloo", "rloo_scored")
    files = {name: metrics / f"{name}.json" for name in names}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    sections = [experiments_html(read_results(metrics / f"{group}.json"), inputs) for group in TITLES]
    if "self_feedback" in found:
        sections.append(self_feedback_html(found["self_feedback"], policy))
    if "claim_rates" in found:
        sections.append(render("claim_rates.html", result=found["claim_rates"], base=base))
    if "fact_rlhf" in found:
        sections.append(fact_rlhf_html(found["fact_rlhf"], found.get("reward_best_of_n"), base))
    sections += [rloo_html(found[name], base) for name in ("rloo", "rloo_scored") if name in found]
    return Markup().join(sections)


def experiments_html(results: Mapping, current: Mapping) -> Markup:
    """The section of one group; "" when none of its experiments were run. `current` are this report's inputs."""
    if not results["experiments"]:
        return Markup()
    parts = ("models", "settings")
    changed = [key for part in parts for key in current[part] if results[part].get(key) != current[part][key]]
    known_truth = any(name in row for e in results["experiments"] for row in e["rounds"].values() for name in TRUTH)
    return render(
        "experiments.html",
        results=results,
        title=TITLES[results["group"]],
        changed=changed,
        verdicts=[verdict(results, name) for name in results["tests"]],
        figure=plots.EXPERIMENTS[results["group"]](results),
        truth=tuple(TRUTH) if known_truth else (),
    )


def verdict(results: Mapping, name: str) -> str:
    """In words: is the experiment's last policy better than the control's, worse, or not different? Two policies
    differ when the paired test says p < 0.05."""
    rates, parts = results["tests"][name]["rates"], []
    for rate, worse, better in (
        ("response_hallucination", "hallucinates in more answers", "hallucinates in fewer answers"),
        ("recall", "names fewer objects", "names more objects"),
    ):
        test = rates[rate]
        gains = (test["difference"] > 0) == (rate == "recall")
        same = f"does not differ in {rate.replace('_', ' ')}"
        words = same if test["p_value"] >= 0.05 else better if gains else worse
        numbers = f"{points(test['difference'])} points, {between(test['interval'])}, {p_value(test['p_value'])}"
        parts.append(f"{words} ({numbers})")
    return f"{name}: {'; '.join(parts)}; paired over the same {rates['recall']['n']} answers."


def self_feedback_html(result: Mapping, aligned: str) -> Markup:
    """The section on best-of-N by the policy's own reward; `aligned` is the fingerprint of this run's policy."""
    curves = {name: result[name]["curve"] for name in ("base", "aligned")}
    largest = max(row["n"] for row in curves["aligned"])
    # the best of one answer is that answer, whatever chooses, and a random one is the same whatever N is
    rows = [
        (policy, row)
        for policy, curve in curves.items()
        for row in sorted(curve, key=lambda row: row["n"])
        if row["n"] in ({1} if row["method"] == "random" else {16, largest} - {1})
    ]
    return render(
        "self_feedback.html",
        rows=rows,
        compared=result["aligned"]["compare"],
        made_by_policy=result["policies"]["aligned"],
        aligned=aligned,
        figure=plots.best_of_n(curves),
    )


def fact_rlhf_html(result: Mapping, best_of_n: Mapping | None, base: str) -> Markup:
    """The section on reward models and their annotators' taste; `best_of_n` are the curves of notebook 91, `base` the
    fingerprint of this run's base model, which the reward models begin as."""
    figure = best_of_n and plots.best_of_n(best_of_n["curves"])
    return render("fact_rlhf.html", result=result, run=best_of_n and best_of_n["run"], base=base, figure=figure)


def rloo_html(result: Mapping, base: str) -> Markup:
    """The section on reinforcement learning beside DPO; `base` is the fingerprint of this run's base model."""
    judge = "a reward model" if any(weights["reward_model"] for weights in result["weights"].values()) else "claims"
    return render("rloo.html", result=result, base=base, judge=judge, figure=plots.rloo(result["logs"]))
