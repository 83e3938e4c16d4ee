"""Findings: the report's sections on what is measured beside the pipeline.

`make ablations`, `make rounds` and `make self-feedback` leave small files in `metrics/`. They may be older than the run
that the report is about, so each section says which checkpoints and settings its numbers are of.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlaifv.evaluation.outcome import TRUTH, describe_inputs, read_results
from rlaifv.params import Params
from rlaifv.records import RATES
from rlaifv.report import plots
from rlaifv.report.page import data_uri, p_text, percent
from rlaifv.vlm.loading import fingerprint_checkpoint

TITLES = {"ablations": "Ablations: what each ingredient is worth", "rounds": "More rounds, or more data?"}
COLUMNS = ("response hall. ↓", "mention hall. ↓", "recall ↑", "words", "pairs (words chosen / rejected)", "last on dev")
TRUTH_COLUMNS = ("right judgements", "pairs that agree with truth")


def experiments_html(results: Mapping, current: Mapping) -> str:
    """The section of one group; "" when none of its experiments were run. `current` is `describe_inputs` of today."""
    if not results["experiments"]:
        return ""
    known_truth = any(name in row for e in results["experiments"] for row in e["rounds"].values() for name in TRUTH)
    columns = [*COLUMNS, *(TRUTH_COLUMNS if known_truth else ())]
    head = "<tr><th>experiment</th>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>"
    body = _row("base", results["experiments"][0]["base"], len(columns))
    for experiment in results["experiments"]:
        rounds = experiment["rounds"]
        for name, row in rounds.items():
            label = experiment["name"] if len(rounds) == 1 else f"{experiment['name']}, round {name}"
            body += _row(label, row, len(columns))
    figure = data_uri(plots.EXPERIMENTS[results["group"]](results))
    title = TITLES.get(results["group"], results["group"])
    asked = "".join(f"<li><b>{_text(e['name'])}</b>: {_text(e['asks'])}</li>" for e in results["experiments"])
    tests = "".join(f"<li>{_text(verdict(results, name))}</li>" for name in results["tests"])
    compared = f"<p>Last rounds compared with {_text(results['control'])}:</p><ul>{tests}</ul>" if tests else ""
    failed = f"<p><b>Failed: {_text(', '.join(results['failed']))}.</b></p>" if results["failed"] else ""
    return (
        f"<h2>{_text(title)}</h2>{origin_html(results, current)}<ul>{asked}</ul><table>{head}{body}</table>"
        "<p><small>Rates of the chosen checkpoint on test; under “last on dev” response hallucination / recall of the "
        "last checkpoint. The selection refuses checkpoints that say less than the base (select.max_recall_drop): if "
        f"the two differ much, training bought less hallucination with less said.</small></p>{compared}"
        f'{failed}<img src="{figure}" alt="{_text(title)}">'
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _row(label: str, row: Mapping, columns: int) -> str:
    pairs = row.get("pairs")
    lengths = f"{pairs['n']} ({pairs['mean_words_chosen']:.1f} / {pairs['mean_words_rejected']:.1f})" if pairs else "–"
    last = "–"
    if training := row.get("training"):
        last = f"{100 * training['last_response_hallucination']:.1f} / {100 * training['last_recall']:.1f}"
    cells = [*(_share(row, rate) for rate in RATES), f"{row['mean_words']:.1f}", lengths, last]
    cells += [_share(row, name) for name in TRUTH][: columns - len(cells)]
    return f"<tr><td>{_text(label)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _share(row: Mapping, rate: str) -> str:
    """A rate in percent with its interval; – where it is unknown."""
    return percent(row, rate) if rate in row else "–"


def verdict(results: Mapping, name: str) -> str:
    """In words: is the experiment's last policy better than the control's, worse, or not different? Two policies
    differ when the paired test says p < 0.05."""
    rates, parts = results["tests"][name]["rates"], []
    for rate, worse, better in (
        ("response_hallucination", "hallucinates in more answers", "hallucinates in fewer answers"),
        ("recall", "names fewer objects", "names more objects"),
    ):
        test = rates[rate]
        low, high = (100 * bound for bound in test["interval"])
        p = p_text(test["p_value"])
        gains = (test["difference"] > 0) == (rate == "recall")
        same = f"does not differ in {rate.replace('_', ' ')}"
        words = same if test["p_value"] >= 0.05 else better if gains else worse
        parts.append(f"{words} ({100 * test['difference']:+.1f} points, {low:+.1f} to {high:+.1f}, {p})")
    n = rates["recall"]["n"]
    return f"{name}: {'; '.join(parts)}; paired over the same {n} answers."


def origin_html(results: Mapping, current: Mapping) -> str:
    """Which checkpoints and settings the numbers are of, and plainly when those are not the ones of this report."""
    models = "; ".join(
        f"{role} <code>{_text(m['path'])}</code> ({m['fingerprint'][:8]})" for role, m in results["models"].items()
    )
    settings = ", ".join(f"{_text(key)} {_text(value)}" for key, value in results["settings"].items())
    changed = [role for role in current["models"] if results["models"].get(role) != current["models"][role]]
    changed += [key for key in current["settings"] if results["settings"].get(key) != current["settings"][key]]
    warning = ""
    if changed:
        warning = (
            "<p><b>These numbers came from other checkpoints or settings than this report's: "
            f"{_text(', '.join(changed))} changed since. <code>make {_text(results['group'])}</code> measures anew."
            "</b></p>"
        )
    return f"{warning}<p><small>Of {models}; {settings}.</small></p>"


def self_feedback_html(result: Mapping, aligned: str) -> str:
    """Best-of-N by the aligned policy's own reward, with 95 % intervals; `aligned` is the fingerprint of this run's."""
    head = "<tr><th>policy</th><th>chosen by</th><th>N</th><th>response hall. ↓</th><th>mention hall. ↓</th>"
    head += "<th>recall ↑</th><th>words</th></tr>"
    body, curves = "", {name: result[name]["curve"] for name in ("base", "aligned")}
    largest = max(row["n"] for row in curves["aligned"])
    for policy, rows in curves.items():
        # the best of one answer is that answer, whatever chooses, and a random one is the same whatever N is
        shown = [r for r in rows if r["n"] in ((1,) if r["method"] == "random" else {16, largest} - {1})]
        for row in sorted(shown, key=lambda r: r["n"]):
            cells = [*(_share(row, rate) for rate in RATES), f"{row['mean_words']:.1f}"]
            body += f"<tr><td>{policy}</td><td>{row['method']}</td><td>{row['n']}</td>"
            body += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    lines = "".join(f"<li>{_text(_gain(row))}</li>" for row in result["aligned"]["compare"] if row["n"] > 1)
    warning = ""
    if result["policies"]["aligned"] != aligned:
        warning = (
            "<p><b>These numbers came from another aligned policy than this report's "
            f"({_text(result['policies']['aligned'][:8])}, now {_text(aligned[:8])}). "
            "<code>make self-feedback</code> measures anew.</b></p>"
        )
    figure = data_uri(plots.best_of_n(curves))
    return (
        f"<h2>Self-feedback: best of N by the model's own reward</h2>{warning}<table>{head}{body}</table>"
        f"<p>The aligned policy's best of N, normalized reward:</p><ul>{lines}</ul>"
        f'<img src="{figure}" alt="Best of N by the model\'s own reward">'
    )


def _gain(row: Mapping) -> str:
    def between(name: str, scale: float, decimals: int) -> str:
        low, high = sorted(scale * bound for bound in row[f"{name}_interval"])
        return f"{scale * row[name]:+.{decimals}f} ({low:+.{decimals}f} to {high:+.{decimals}f})"

    return (
        f"N = {row['n']}: response hallucination {between('relative_reduction', -100, 0)} % relative and recall "
        f"{between('recall_change', 100, 2)} points against one random answer; against the summed reward "
        f"{between('hallucination_against_summed', 100, 2)} points of hallucination, "
        f"{between('recall_against_summed', 100, 2)} points of recall"
    )


def findings_html(metrics: Path, groups: Sequence[str], params: Params, policy: Path) -> str:
    """All sections for which the folder `metrics` has results; `params` and the aligned `policy` are the report's."""
    current = describe_inputs(params)
    sections = [experiments_html(read_results(metrics / f"{group}.json"), current) for group in groups]
    file = metrics / "self_feedback.json"
    if file.is_file():
        sections.append(self_feedback_html(json.loads(file.read_text()), fingerprint_checkpoint(str(policy))))
    return "".join(sections)
