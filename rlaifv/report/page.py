"""The report's numbers: one summary of all iterations, and the sections of published benchmarks and of the plan."""

import datetime
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from rlaifv import ROOT
from rlaifv.benchmarks.published import HEADLINES
from rlaifv.records import rates_of
from rlaifv.report.compare_view import counts
from rlaifv.report.render import render
from rlaifv.results import Result
from rlaifv.steps.select import keeps_recall

SOURCES = ("rlaifv", "notebooks", "params.yaml", "dvc.yaml")
"""What of the repository a report's numbers come from."""


def summarize(
    results: Mapping[str, Result], timings: Sequence[Mapping], max_recall_drop: float, labeler: Mapping | None
) -> dict:
    """The contents of metrics/summary.json.

    Args:
        results: by iteration in order, "0" the base.
        timings: rows of `results.read_timings`.
        max_recall_drop: `select.max_recall_drop`.
        labeler: its exam, rows of `accuracy`, `per_type`, `n`; None: there was none.
    """
    iterations = {name: result.test for name, result in results.items() if name != "0"}
    base, last = results["0"].test, list(results)[-1]
    final = {"iteration": int(last), **results[last].test}
    wrong = rates_of(base)[0]
    on_gpu = [t["peak_gpu_gb"] for t in timings if "peak_gpu_gb" in t]
    exam = labeler or {"n": 0}
    return {
        "base": base,
        "iterations": iterations,
        "final": final,
        "recall_lost": recall_lost(results, max_recall_drop),
        "paired_test": results[last].paired_test or {},
        "benchmarks": {
            name: {s["model"]: {rate: s["metrics"][rate] for rate in _rates(s)} for s in scored}
            for name, scored in _by_benchmark(results).items()
        },
        "relative_reduction": 1 - final[wrong] / base[wrong] if base[wrong] else 0.0,
        "labeler_accuracy": {"overall": exam.get("accuracy"), **exam.get("per_type", {}), "n": exam["n"]},
        "minutes": round(sum(t["minutes"] for t in timings), 2),
        "peak_memory_gb": max((t["peak_memory_gb"] for t in timings), default=0.0),
        **({"peak_gpu_gb": max(on_gpu)} if on_gpu else {}),
    }


def day_and_commit(repository: Path = ROOT) -> str:
    """The day and the commit that a report is of: "2026-11-27 at commit 1a2b3c4 with changes"; without the commit where
    there is none."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=repository, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git
            return ""

    commit = git("rev-parse", "--short", "HEAD")
    changed = " with changes" if commit and git("status", "--porcelain", "--", *SOURCES) else ""
    return f"{datetime.date.today()}" + (f" at commit {commit}{changed}" if commit else "")


def headline(summary: Mapping) -> dict[str, float]:
    """The numbers of metrics/headline.json, which DVC's tables show: the last iteration's rates on test, and how much
    less it hallucinates than the base; rounded."""
    final = summary["final"]
    rates = {name: round(final[name], 4) for name in (*rates_of(final), "mean_words")}
    return rates | {"relative_reduction": round(summary["relative_reduction"], 4)}


def errors_html(rows: Sequence[Mapping], annotated: bool, image_root: Path, shown: int) -> Markup:
    """The section on what is still wrong and what is not any more; `rows` are those of `compare_view.compare`, base
    against final. With `annotated` images errors are counted by object class, the twelve most frequent first."""
    before, after = (Counter(name for row in rows for name in row["wrong"][side]) for side in (0, 1))
    named = Counter(name for row in rows for name in row["right"][1])
    classes = [
        {"name": name, "before": before[name], "after": after[name], "right": named[name]}
        for name, _ in (before + after).most_common(12)
    ]
    failed = [row for row in rows if row["wrong"][1]]
    return render(
        "errors.html",
        counts=counts(rows),
        n=len(rows),
        classes=classes if annotated else [],
        failed=len(failed),
        failures=[(image_root / row["image"], row) for row in failed[:shown]],
    )


def feedback_html(results: Mapping[str, Result], image_root: Path, shown: int = 12) -> Markup:
    """The section on what the labeler rejected and what pairs that made; "" where no iteration has feedback.

    The most frequent rejected claims of the first iteration stand beside how often the last one's answers make them:
    what is learned away. Where a claim is not among the last one's most frequent, it is rarer than the rarest of these.
    """
    told = {name: result.feedback for name, result in results.items() if result.feedback}
    if not told:
        return Markup()
    first, *_, last = [*told.values(), *told.values()]
    later = dict(map(tuple, last["rejected"]))
    learned = [
        {"claim": text, "first": 1000 * number / first["answers"], "last": 1000 * later.get(text, 0) / last["answers"]}
        for text, number in first["rejected"][:shown]
    ]
    return render(
        "feedback.html",
        told=told,
        kinds=sorted({kind for row in told.values() for kind in row["per_kind"]}),
        learned=learned if len(told) > 1 else [],
        examples=[(image_root / row["image"], row) for row in last["examples"]],
    )


def with_contents(page: str) -> Markup:
    """The page with an anchor at each `<h2>`, and links to all of them in its empty `<nav>`."""
    titles: list[str] = []

    def anchored(found: re.Match) -> str:
        titles.append(found[1])
        return f'<h2 id="section-{len(titles)}">{found[1]}</h2>'

    page = re.sub(r"<h2>(.*?)</h2>", anchored, page, flags=re.DOTALL)
    links = "\n".join(f'<a href="#section-{n}">{title}</a>' for n, title in enumerate(titles, start=1))
    return Markup(page.replace("<nav></nav>", f"<nav>{links}</nav>", 1))


def plan_html(rows: Sequence[Mapping], machine: str) -> Markup:
    """The section that compares what `plan` said of the stages with what they took (`Plan.compared`); "" without rows.

    `off` is the share by which a stage took longer than planned, `left` what remains of it when all estimates are
    scaled by the median ratio: how far the calibrated plan can be trusted.
    """
    if not rows:
        return Markup()
    ratios = [row["minutes"] / row["estimate"] for row in rows]
    scale = statistics.median(ratios)
    shown = [row | {"off": ratio - 1, "left": ratio / scale - 1} for row, ratio in zip(rows, ratios, strict=True)]
    return render("plan.html", rows=shown, machine=machine, scale=scale)


def recall_lost(results: Mapping[str, Result], max_recall_drop: float) -> dict[str, dict[str, float]]:
    """Iterations in which no checkpoint kept the base's recall on dev (`select.max_recall_drop`; by claims its accepted
    claims), so that the one with the highest was taken → {"base": its recall, "chosen": the checkpoint's}."""
    base = results["0"].dev[0]
    said = rates_of(base)[2]
    return {
        name: {"base": base[said], "chosen": result.selection[said]}
        for name, result in results.items()
        if name != "0" and not keeps_recall(result.selection, base, max_recall_drop)
    }


def _by_benchmark(results: Mapping[str, Result]) -> dict[str, list[dict]]:
    """Benchmark → the scores of all whose answers to it were scored."""
    found: dict[str, list[dict]] = {}
    for result in results.values():
        for name, scored in (result.benchmarks or {}).items():
            found.setdefault(name, []).append(scored)
    return found


def _rates(scored: Mapping) -> list[str]:
    return [rate for rate in HEADLINES[scored["kind"]] if rate in scored["intervals"]]


def benchmarks_html(results: Mapping[str, Result]) -> Markup:
    """The section of published benchmarks, a table each; "" where none is configured."""
    benchmarks = {}
    for name, scored in _by_benchmark(results).items():
        first, rates = scored[0], _rates(scored[0])
        published = [row for row in first["published"][1:] if any(row.get(rate) is not None for rate in rates)]
        benchmarks[name] = {"rates": rates, "means": first["means"], "settings": first["settings"]}
        benchmarks[name] |= {"scored": scored, "published": published}
    return render("benchmarks.html", benchmarks=benchmarks) if benchmarks else Markup()
