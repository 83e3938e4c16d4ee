"""Figures for notebooks and report. Each function takes plain rows and returns a matplotlib Figure.

Texts that come from data are drawn with `parse_math=False`: matplotlib reads `$…$` as a formula, and stops at one that
it cannot read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlaifv.records import RATES, rates_of
from rlaifv.report.render import scale, yes_share
from rlaifv.steps.select import least
from rlaifv.vlm.images import open_image

RED, GREEN, BLUE, GRAY = "#c0392b", "#2e8b57", "#2c6fad", "#7f8c8d"
PANELS = {
    "response_hallucination": ("Response hallucination ↓ (%)", RED),
    "mention_hallucination": ("Mention hallucination ↓ (%)", RED),
    "recall": ("Recall ↑ (%)", GREEN),
    "response_rejection": ("Answers with a rejected claim ↓ (%)", RED),
    "claim_rejection": ("Rejected claims ↓ (%)", RED),
    "accepted_claims": ("Accepted claims an answer ↑", GREEN),
    "claim_accuracy": ("Right judgements ↑ (%)", BLUE),
    "pair_agreement": ("Pairs that agree with truth ↑ (%)", BLUE),
}
"""Rate → the title and the color of its panel."""

plt.rc("figure", dpi=110)
plt.rc("savefig", dpi=130, bbox="tight")
plt.rc("axes", titlesize=11, titleweight="bold", grid=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", alpha=0.25)
plt.rc("legend", frameon=False)
plt.rc("font", size=9.5)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without the date and version that would make equal figures differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def image_grid(image_root: Path, paths: Sequence[str], titles: Sequence[str], columns: int = 6) -> Figure:
    """Images with a short title each."""
    rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, path, title in zip(axes.flat, paths, titles, strict=False):
        axis.imshow(open_image(image_root / path))
        axis.set_title(title, fontsize=8, fontweight="normal", parse_math=False)
    return figure


def judgements(p_yes: Sequence[float], p_no: Sequence[float], min_mass: float) -> Figure:
    """Left: P(yes) of all claims. Right: the mass that the labeler put on yes or no at all."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    share = np.array(p_yes) / np.maximum(np.array(p_yes) + np.array(p_no), 1e-12)
    left.hist([share[share <= 0.5], share[share > 0.5]], bins=np.linspace(0, 1, 41), color=[RED, GREEN], stacked=True)
    left.set(xlabel="P(yes) / (P(yes) + P(no))", ylabel="claims", yscale="log", title="rejected and accepted claims")
    right.hist(np.array(p_yes) + np.array(p_no), bins=np.linspace(0, 1, 41), color=BLUE)
    right.axvline(min_mass, color=GRAY, linestyle="--")
    right.set(xlabel="P(yes) + P(no)", yscale="log", title="mass on an answer at all")
    return figure


def lengths(statistics: Sequence[Mapping[str, object]], names: Sequence[str]) -> Figure:
    """Mean words of chosen and rejected answers, a group of bars per iteration."""
    words = {kind: [row[f"mean_words_{kind}"] for row in statistics] for kind in ("chosen", "rejected")}
    table = pd.DataFrame(words, index=[f"iteration {name}" for name in names])
    axis = table.plot.bar(figsize=(4.2, 2.8), color=[GREEN, RED], rot=0, ylabel="mean words")
    axis.set_title("Length of the pairs' answers")
    axis.margins(y=0.25)
    axis.legend(loc="upper center", ncols=2)
    return axis.figure


def calibration(rows: Sequence[Mapping[str, float]]) -> Figure:
    """The labeler's reliability diagram (`hallucination.calibration`): on the dashed line, P(yes) is what it says."""
    figure, axis = plt.subplots(figsize=(4.2, 3.4))
    axis.plot([0, 1], [0, 1], "--", color=GRAY, lw=1)
    sizes = [20 + 180 * row["n"] / sum(r["n"] for r in rows) for row in rows]
    axis.scatter([row["p_yes"] for row in rows], [row["yes"] for row in rows], s=sizes, color=BLUE, zorder=2)
    for row in rows:
        axis.annotate(str(row["n"]), (row["p_yes"], row["yes"]), xytext=(7, -9), textcoords="offset points", fontsize=8)
    axis.set(xlabel="P(yes)", ylabel="true answer is yes", title="Labeler on questions of known truth")
    axis.set(xlim=(-0.05, 1.12), ylim=(-0.1, 1.1))
    return figure


def training(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss, reward margin and preference accuracy against epochs, a line per iteration."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.9))
    titles = {"loss": "DPO loss", "rewards_margins": "reward margin", "rewards_accuracies": "preference accuracy"}
    colors = plt.cm.viridis(np.linspace(0.15, 0.8, len(logs)))
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for (name, rows), color in zip(logs.items(), colors, strict=True):
            axis.plot([r["epoch"] for r in rows], [r[column] for r in rows], color=color, label=f"iteration {name}")
        axis.set(xlabel="epoch", title=title)
    axes[0].legend()
    return figure


def rloo(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Reinforcement learning by step, a color per run: sampled answers with a false claim, as the labeler has it and,
    dotted, as it is; tokens; KL to the base. Means of ten steps, because each has other instructions."""
    panels = {"judged_hallucination": ("Sampled answers with a false claim (%)", 100)}
    panels |= {"tokens": ("Tokens of an answer", 1), "kl": ("KL to the base (nats a token)", 1)}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    colors = plt.cm.viridis(np.linspace(0.15, 0.8, len(logs)))
    for (name, rows), color in zip(logs.items(), colors, strict=True):
        table = pd.DataFrame(rows).set_index("step").rolling(10, min_periods=1).mean()
        for axis, (column, (title, factor)) in zip(axes, panels.items(), strict=True):
            if column in table:  # a run that no labeler judges has the truth's line alone
                axis.plot(factor * table[column], color=color, label=name)
            axis.set(title=title, xlabel="step")
        if "true_hallucination" in table:
            axes[0].plot(100 * table["true_hallucination"], ":", color=color, label=f"{name}, truth")
    for axis in axes[:2]:
        axis.set_ylim(bottom=0)
    axes[0].legend()
    return figure


def checkpoints(rows: Sequence[Mapping], chosen: str, base: Mapping, max_recall_drop: float) -> Figure:
    """Dev hallucination and recall (by claims: rejected and accepted ones) of every checkpoint, the chosen one marked,
    the base as dashed lines."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.9))
    picked = 1 + [row["checkpoint"] for row in rows].index(chosen)
    wrong, _, said = rates_of(base)
    for axis, column, color in ((left, wrong, RED), (right, said, GREEN)):
        values = [row[column] for row in rows]
        axis.plot(range(1, len(rows) + 1), values, "o-", color=color, markersize=4)
        axis.axhline(base[column], color=GRAY, linestyle="--", label="base")
        axis.plot(picked, values[picked - 1], "o", color="black", markersize=9, fillstyle="none")
        axis.set(xlabel="checkpoint", title=f"dev {column.replace('_', ' ')}")
    right.axhline(least(base, max_recall_drop), color=GRAY, linestyle=":", label="lowest allowed")
    right.legend()
    left.legend()
    return figure


def _interval_bars(axis: Axes, at: Sequence[float], rows: Sequence[Mapping], rate: str, along: str, **style) -> None:
    """Points with their 95 % intervals, in percent where the rate is a fraction; `along` is the axis of the rates, `at`
    lies on the other."""
    values = scale(rate) * np.array([row[rate] for row in rows])
    low, high = scale(rate) * np.array([row[f"{rate}_interval"] for row in rows]).T
    # a percentile interval need not hold the point where nearly all rows are alike
    errors = np.maximum([values - low, high - values], 0)
    x, y = (values, at) if along == "x" else (at, values)
    axis.errorbar(x, y, **{f"{along}err": errors}, capsize=2.5, **style)


def ablations(results: Mapping) -> Figure:
    """Every experiment's last iteration as a point with its 95 % interval, a panel per rate; `results` are those of
    metrics/ablations.json. The control is filled, the base model a dashed line."""
    experiments = results["experiments"][::-1]
    last = [list(e["rounds"].values())[-1] for e in experiments]
    shown = [rate for rate in PANELS if rate != "mention_hallucination" and any(rate in row for row in last)]
    size = (2.9 * len(shown) + 1, 0.42 * len(experiments) + 1.1)
    figure, axes = plt.subplots(1, len(shown), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, rate in zip(axes[0], shown, strict=True):
        title, color = PANELS[rate]
        for at, (experiment, row) in enumerate(zip(experiments, last, strict=True)):
            if rate in row:
                filled = "full" if experiment["name"] == results["control"] else "none"
                _interval_bars(axis, [at], [row], rate, "x", fmt="o", color=color, fillstyle=filled)
        if rate in experiments[0]["base"]:
            base = 100 * experiments[0]["base"][rate]
            axis.axvline(base, color=GRAY, linestyle="--")
            axis.text(base, 1, " base", transform=axis.get_xaxis_transform(), color=GRAY, fontsize=7.5, va="top")
        axis.set_title(title, fontsize=9.5)
        axis.margins(x=0.12, y=0.12)
    axes[0][0].set_yticks(range(len(experiments)), [e["name"] for e in experiments], parse_math=False)
    return figure


def rounds(results: Mapping) -> Figure:
    """Test hallucination and recall against iterations with 95 % intervals, a line per experiment from the base model
    on; `results` are those of metrics/rounds.json. The control stands as a marker of its own at the right end."""
    figure, axes = plt.subplots(1, len(RATES), figsize=(12, 3.4), layout="constrained")
    rates = rates_of(results["experiments"][0]["base"])
    controls = [e for e in results["experiments"] if e["name"] == results["control"]]
    lines = [e for e in results["experiments"] if e not in controls]
    longest = max((int(name) for e in results["experiments"] for name in e["rounds"]), default=1)
    for axis, rate in zip(axes, rates, strict=True):
        for experiment, color, shift in zip(lines, (RED, BLUE, "#8e44ad", GRAY), (0, 0.06, 0.12, 0.18), strict=False):
            rows = [experiment["base"], *experiment["rounds"].values()]
            at = [shift, *(int(name) + shift for name in experiment["rounds"])]
            style = "o--" if experiment["name"] == "self" else "o-"
            _interval_bars(axis, at, rows, rate, "y", fmt=style, color=color, markersize=4, label=experiment["name"])
        for control in controls:
            style = {"fmt": "D", "color": "black", "markersize": 5, "label": control["name"]}
            _interval_bars(axis, [longest + 0.3], [list(control["rounds"].values())[-1]], rate, "y", **style)
        axis.set_xticks(range(longest + 1), ["base", *range(1, longest + 1)])
        axis.set(title=PANELS[rate][0], xlabel="iteration")
        axis.margins(x=0.06, y=0.15)
    for name in axes[0].legend(loc="upper right").get_texts():
        name.set_parse_math(False)
    return figure


def result(rows: Mapping[str, Mapping]) -> Figure:
    """Test hallucination and recall against iterations with 95 % intervals and their values; iteration "0" is the base.
    `rows` have the rates, and `<rate>_interval` = (low, high)."""
    base, *others = rows
    policy = {"name": "policy", "base": rows[base], "rounds": {name: rows[name] for name in others}}
    figure = rounds({"experiments": [policy], "control": ""})
    for axis, rate in zip(figure.axes, rates_of(rows[base]), strict=True):
        for name, row in rows.items():
            value = scale(rate) * row[rate]
            axis.annotate(
                f"{value:.{2 if 0 < value < 1 else 1}f}", (int(name), value), textcoords="offset points", xytext=(5, 4)
            )
    if "recall" in rows[base]:
        figure.axes[-1].set_ylim(0, 109)  # a small loss shall look small
    else:
        figure.axes[-1].set_ylim(bottom=0)
    return figure


EXPERIMENTS = {"ablations": ablations, "rounds": rounds}
"""The figure of each group of experiments/experiments.yaml."""


def gallery(image_root: Path, base: Sequence[Mapping], aligned: Sequence[Mapping], limit: int = 4) -> Figure:
    """Images with the base's and the aligned model's claims beside them, green to red by p_yes."""
    rows = list(zip(base, aligned, strict=True))[:limit]
    figure, axes = plt.subplots(len(rows), 3, figsize=(11, 2.9 * len(rows)), squeeze=False, width_ratios=(1, 1.7, 1.7))
    for (before, after), (picture, *columns) in zip(rows, axes, strict=True):
        picture.imshow(open_image(image_root / before["image"]))
        for axis, row, title in zip(columns, (before, after), ("base", "aligned"), strict=True):
            axis.set_title(title, loc="left")
            text = {"va": "top", "parse_math": False}
            if not row["claims"]:  # an answer that the divider could not split is shown as it is
                axis.text(0, 0.98, fill(row["answer"], 48), fontsize=7.5, **text)
                axis.text(0, 0.5, fill(f"not divided: {row['problem']}", 48), fontsize=7, color=GRAY, **text)
            spacing = 1 / max(len(row["claims"]), 13)
            for i, claim in enumerate(row["claims"]):
                box = {"facecolor": plt.cm.RdYlGn(yes_share(claim)), "alpha": 0.45, "edgecolor": "none", "pad": 1.2}
                axis.text(0, 0.98 - i * spacing, claim["claim"], fontsize=7.5, bbox=box, **text)
        for axis in (picture, *columns):
            axis.axis("off")
    return figure


def best_of_n(curves: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Response hallucination and recall against N (left, middle) and against each other (right); `curves` are the rows
    of `best_of_n.curve` per policy. The first policy is dashed."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    rates = ("response_hallucination", "recall")
    colors = {"normalized": GREEN, "summed": BLUE, "random": GRAY, "oracle": "#b7950b", "reward_model": "#8e44ad"}
    for (policy, rows), line in zip(curves.items(), ("--", "-"), strict=False):
        for method, color in colors.items():
            mine = [row for row in rows if row["method"] == method]
            if not mine:
                continue
            at = [row["n"] for row in mine]
            style = {"linestyle": line, "marker": "o", "markersize": 3, "color": color}
            values = {rate: 100 * np.array([row[rate] for row in mine]) for rate in rates}
            axes[2].plot(*values.values(), **style)
            for axis, rate in zip(axes[:2], values, strict=True):
                axis.plot(at, values[rate], label=f"{policy}, {method}", **style)
                low, high = 100 * np.array([row[f"{rate}_interval"] for row in mine]).T
                if line == "-" and method in ("normalized", "summed"):
                    axis.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
    for axis, rate in zip(axes, rates, strict=False):
        axis.set_xscale("log", base=2)
        axis.set(title=PANELS[rate][0], xlabel="N, best of", xticks=at, xticklabels=at)
    axes[0].set_ylim(bottom=0)
    # below the panels: within one it would hide curves
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    axes[2].set(title="Both: up and left is better", xlabel="response hallucination (%)", ylabel="recall (%)")
    return figure


def log_ratios(values: np.ndarray, hallucinated: np.ndarray) -> Figure:
    """How often a sampled answer has which log-ratio log π_θ − log π_ref: `values` in nats, and whether each answer
    hallucinates, two arrays of one shape. Counts are on a logarithmic axis: best-of-N lives in the right tail."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    style = {"label": ["true to the image", "hallucinating"], "color": [GREEN, RED], "histtype": "stepfilled"}
    axis.hist([values[~hallucinated], values[hallucinated]], 60, alpha=0.55, **style)
    axis.set(xlabel="log π_θ − log π_ref of an answer (nats)", ylabel="answers", yscale="log")
    axis.set_title("What the reward separates, and what it does not")
    axis.legend()
    return figure
