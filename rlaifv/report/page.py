"""Report: one summary of all rounds, and a self-contained HTML page with pictures."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rlaifv.benchmarks.published import HEADLINES
from rlaifv.records import RATES
from rlaifv.steps.select import keeps_recall

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1020px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; } .lead { color: #555; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
td small { display: block; white-space: nowrap; line-height: 1.1; color: #777; }
img { max-width: 100%; } .example { display: grid; grid-template-columns: 180px 1fr 1fr; gap: 1rem; margin: 1.2rem 0; }
.example img { width: 180px; border: 1px solid #ddd; } .example p { margin: .2rem 0 .5rem; }
.claim { display: inline-block; margin: 2px 3px 2px 0; padding: 1px 6px; border-radius: 4px; font-size: 13px; }
"""


def summarize(results: Mapping[str, dict], timings: Sequence[Mapping], max_recall_drop: float) -> dict:
    """The contents of metrics/summary.json; `results` are by round, "0" the base."""
    rounds = sorted((name for name in results if name != "0"), key=int)
    base = results["0"]["test"]
    chosen = [{"iteration": int(name), **results[name]["test"]} for name in rounds]
    final = chosen[-1] if chosen else {"iteration": 0, **base}
    reduction = 1 - final["response_hallucination"] / base["response_hallucination"]
    labeler = results["0"]["labeler"]
    return {
        "base": base,
        "iterations": chosen,
        "final": final,
        "recall_lost": recall_lost(results, max_recall_drop),
        "paired_test": results[rounds[-1]]["paired_test"] if rounds else {},
        "benchmarks": _headlines(results),
        "relative_reduction": reduction if base["response_hallucination"] else 0.0,
        "labeler_accuracy": {"overall": labeler.get("accuracy"), **labeler.get("per_type", {}), "n": labeler["n"]},
        "minutes": round(sum(t["minutes"] for t in timings), 2),
        "peak_memory_gb": max((t["peak_memory_gb"] for t in timings), default=0.0),
    }


def recall_lost(results: Mapping[str, dict], max_recall_drop: float) -> dict[str, dict[str, float]]:
    """Rounds in which no checkpoint kept the base's recall on dev (`select.max_recall_drop`), so that the one with the
    highest was taken → {"base": its recall, "chosen": the checkpoint's}."""
    chosen = {name: result["selection"] for name, result in results.items() if "selection" in result}
    return {
        name: {"base": results["0"]["dev"]["recall"], "chosen": row["recall"]}
        for name, row in chosen.items()
        if not keeps_recall(row, results["0"]["dev"], max_recall_drop)
    }


def _headlines(results: Mapping[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Benchmark → model → its headline rates, as fractions and means; {} where none is configured."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for result in results.values():
        for name, scored in result.get("benchmarks", {}).items():
            rates = [rate for rate in HEADLINES[scored["kind"]] if rate in scored["intervals"]]
            found.setdefault(name, {})[scored["model"]] = {rate: scored["metrics"][rate] for rate in rates}
    return found


def data_uri(figure_or_path: Figure | Path) -> str:
    """A figure or an image file as a data URI, so that the page needs no other file."""
    if isinstance(figure_or_path, Path):
        data, kind = figure_or_path.read_bytes(), figure_or_path.suffix.lstrip(".").lower().replace("jpg", "jpeg")
    else:
        buffer = io.BytesIO()
        figure_or_path.savefig(buffer, format="png", metadata={"Software": None})
        data, kind = buffer.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def claim_html(claim: Mapping) -> str:
    """A claim on a background from red (P(yes) 0) over yellow to green (P(yes) 1)."""
    share = claim["p_yes"] / max(claim["p_yes"] + claim["p_no"], 1e-12)
    tip = f"p_yes {claim['p_yes']:.3f}, p_no {claim['p_no']:.3f}"
    color = f"hsl({120 * share:.0f} 70% 82%)"
    return f'<span class="claim" style="background:{color}" title="{tip}">{html.escape(claim["claim"])}</span>'


def answer_html(row: Mapping) -> str:
    claims = "".join(claim_html(claim) for claim in row["claims"])
    problem = "" if row["claims"] else f"<small>not divided: {html.escape(row.get('problem', ''))}</small>"
    return f"<p>{html.escape(row['answer'])}</p>{claims}{problem}"


def example_html(image: Path, base: Mapping, aligned: Mapping) -> str:
    """One image with the base's and the aligned answer, claim by claim."""
    return (
        f'<div class="example"><img src="{data_uri(image)}" alt="">'
        f"<div><b>base</b>{answer_html(base)}</div><div><b>aligned</b>{answer_html(aligned)}</div></div>"
    )


def rates_table(rows: Sequence[Mapping]) -> str:
    """Rates per round in percent, with yes/no accuracy and answer length beside them."""
    head = "<tr><th>model</th><th>response hall. ↓</th><th>mention hall. ↓</th><th>recall ↑</th>"
    head += "<th>mean words</th><th>yes/no accuracy</th><th>n</th></tr>"
    body = ""
    for row in rows:
        name = "base" if row["iteration"] == 0 else f"round {row['iteration']}"
        cells = [percent(row, rate) for rate in RATES]
        yes_no = row["yes_no"].get("accuracy")
        cells += [f"{row['mean_words']:.1f}", "–" if yes_no is None else f"{100 * yes_no:.1f}", str(row["n"])]
        body += f"<tr><td>{name}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f"<table>{head}{body}</table>"


def percent(row: Mapping, rate: str) -> str:
    """A rate in percent, with its interval where the row has one."""
    text = f"{100 * row[rate]:.1f}"
    if interval := row.get(f"{rate}_interval"):
        text += f" <small>({100 * interval[0]:.1f}–{100 * interval[1]:.1f})</small>"
    return text


def p_text(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def paired_html(tests: Mapping[str, Mapping]) -> str:
    """One line: the final model against the base on the same test rows, in percentage points."""
    parts = []
    for rate, test in tests.items():
        low, high = (100 * bound for bound in test["interval"])
        p = p_text(test["p_value"])
        name = rate.replace("_", " ")
        parts.append(f"{name} {100 * test['difference']:+.1f} points ({low:+.1f} to {high:+.1f}), {p}")
    if not parts:
        return ""
    n = next(iter(tests.values()))["n"]
    return f"<p>Last round against base, paired over the same {n} answers: {'; '.join(parts)}.</p>"


def recall_html(lost: Mapping[str, Mapping[str, float]]) -> str:
    """A warning for every round that bought less hallucination with less said; "" where recall was kept."""
    return "".join(
        f"<p><b>Round {html.escape(name)} says less than the base:</b> no checkpoint kept enough of its recall on dev "
        f"({100 * recalls['base']:.1f} %, select.max_recall_drop); the one with the highest, "
        f"{100 * recalls['chosen']:.1f} %, was taken. Rates of hallucination beside a lower recall are no improvement: "
        "try fewer steps or a lower train.learning_rate.</p>"
        for name, recalls in lost.items()
    )


def benchmarks_html(results: Mapping[str, Mapping]) -> str:
    """A section with one table a benchmark: base, rounds and others' answers above the paper's rows.

    Rates are in percent with their 95 % intervals, means as they are; below each table stands whether its rows may be
    compared with the paper's, and if not, why.
    """
    names = list(dict.fromkeys(name for result in results.values() for name in result.get("benchmarks", {})))
    if not names:
        return ""
    return "<h2>Published benchmarks</h2>" + "".join(
        _benchmark_html(name, [r["benchmarks"][name] for r in results.values() if name in r.get("benchmarks", {})])
        for name in names
    )


def _benchmark_html(name: str, scored: Sequence[Mapping]) -> str:
    first = scored[0]
    rates = [rate for rate in HEADLINES[first["kind"]] if rate in first["intervals"]]

    def cell(rate: str, value: float | None, bounds: Sequence[float] | None = None) -> str:
        if value is None:
            return "–"
        scale, digits = (1, 2) if rate in first["means"] else (100, 1)
        between = bounds and f" <small>({scale * bounds[0]:.{digits}f}–{scale * bounds[1]:.{digits}f})</small>"
        return f"{scale * value:.{digits}f}{between or ''}"

    def row(label: str, cells: Sequence[str], last: str) -> str:
        return f"<tr><td>{html.escape(label)}</td>" + "".join(f"<td>{c}</td>" for c in [*cells, last]) + "</tr>"

    head = "<tr><th>model</th>" + "".join(f"<th>{rate.replace('_', ' ')}</th>" for rate in rates)
    body = "".join(
        row(
            result["model"],
            [cell(rate, result["metrics"][rate], result["intervals"][rate]) for rate in rates],
            f"{result['metrics']['n']:g}",
        )
        for result in scored
    )
    published = [r for r in first["published"][1:] if any(r.get(rate) is not None for rate in rates)]
    body += "".join(
        row(f"{r['model']} ({r['source']})", [cell(rate, r.get(rate)) for rate in rates], "published")
        for r in published
    )
    notes = [f"{key.replace('_', ' ')}: {value}" for key, value in first["settings"].items()]
    notes += [f"{r['model']}: {len(r['missing'])} rows not scored" for r in scored if r["missing"]]
    for result in scored if published else ():
        ours = result["published"][0]
        verdict = "comparable with" if ours["comparable"] else "not comparable with"
        because = "" if ours["comparable"] else f" ({ours['because']})"
        notes.append(f"{result['model']}: {verdict} the published rows{because}")
    lines = "".join(f"<br>{html.escape(note)}" for note in notes)
    return f"<h3>{html.escape(name)}</h3><table>{head}<th>n</th></tr>{body}</table><p><small>{lines[4:]}</small></p>"


def page(
    summary: Mapping,
    figures: Mapping[str, Figure],
    examples: Sequence[str],
    models: Mapping[str, str],
    benchmarks: str = "",
    findings: str = "",
) -> str:
    """The whole HTML page; `benchmarks` is the section of `benchmarks_html`, `findings` those of `findings_html`."""
    rows = [{"iteration": 0, **summary["base"]}, *summary["iterations"]]
    labeler = summary["labeler_accuracy"]
    per_type = ", ".join(
        f"{k} {100 * v:.1f}" for k, v in labeler.items() if k not in ("overall", "n") and v is not None
    )
    overall = "not measured" if labeler["overall"] is None else f"{100 * labeler['overall']:.1f} % ({per_type})"
    pictures = "".join(
        f'<h2>{html.escape(title)}</h2><img src="{data_uri(figure)}" alt="{html.escape(title)}">'
        for title, figure in figures.items()
    )
    zero = ""
    if any(row["response_hallucination"] == 0 for row in rows):  # resampled zeros are zeros
        zero = (
            f" (an observed zero may be up to 3/n = {300 / summary['base']['n']:.1f} %, which a bootstrap cannot show)"
        )
    model_lines = "".join(f"<li>{role}: <code>{html.escape(name)}</code></li>" for role, name in models.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>RLAIF-V report</title><style>{STYLE}</style></head><body>
<h1>RLAIF-V: what open feedback taught the model</h1>
<p class="lead">{len(summary["iterations"])} rounds. Response hallucination on test
{100 * summary["base"]["response_hallucination"]:.1f} % → {100 * summary["final"]["response_hallucination"]:.1f} %
({100 * summary["relative_reduction"]:.1f} % less), recall {100 * summary["base"]["recall"]:.1f} % →
{100 * summary["final"]["recall"]:.1f} %.</p>
{rates_table(rows)}
{recall_html(summary["recall_lost"])}
{paired_html(summary["paired_test"])}
<p>Answers to {summary["base"]["n"]} test instructions, rates in percent with 95 % bootstrap intervals{zero}. Counted
as Object HalBench does, with objects found by vocabulary instead of a judge: compare them with each other, not with
published figures. Labeler accuracy on held-out balanced claims: {overall}.
The stages took {summary["minutes"]} minutes in all and {summary["peak_memory_gb"]} GB at the most.</p>
<ul>{model_lines}</ul>
{benchmarks}
{pictures}
<h2>Before and after, claim by claim</h2>
<p>Test images, not picked: the first of the split. Each claim is colored by the labeler's P(yes).</p>
{"".join(examples)}
{findings}
</body></html>
"""
