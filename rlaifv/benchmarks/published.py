"""What a report shows of a benchmark: its headline rates, the published numbers, and whether they may be compared.

A number is comparable with a paper's only when it was made by the same judge and the same protocol. Those judges are
retired, so most scores of today are not, and the table says why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlaifv.evaluation.scores import Scores

V1, V2 = "arXiv 2405.17220v1", "arXiv 2405.17220v2 (CVPR 2025)"


@dataclass(frozen=True)
class Row:
    """One model's published result on one benchmark: rates as fractions, MMHal's score in points."""

    benchmark: str
    model: str
    source: str
    metrics: Mapping[str, float]


def _row(benchmark: str, model: str, source: str, **metrics: float) -> Row:
    return Row(benchmark, model, source, metrics)


ROWS = (
    _row("object_halbench", "LLaVA-1.5-7B", V1, chair_s_refine=0.536, chair_i=0.252),
    _row("object_halbench", "LLaVA-1.5-7B", V2, chair_s_refine=0.545, chair_i=0.278),
    _row("object_halbench", "LLaVA-RLHF 13B", V1, chair_s_refine=0.381, chair_i=0.189),
    _row("object_halbench", "OmniLMM-12B", V1, chair_s_refine=0.194, chair_i=0.109),
    _row("object_halbench", "RLAIF-V 7B", V1, chair_s_refine=0.085, chair_i=0.043),
    _row("object_halbench", "RLAIF-V 7B", V2, chair_s_refine=0.105, chair_i=0.052),
    _row("object_halbench", "RLAIF-V 7B, best of N", V2, chair_s_refine=0.068, chair_i=0.038),
    _row("object_halbench", "RLAIF-V 12B", V1, chair_s_refine=0.045, chair_i=0.029),
    _row("object_halbench", "GPT-4V", V1, chair_s_refine=0.136, chair_i=0.073),
    _row("mmhal", "LLaVA-1.5-7B", V1, score=2.36, hallucination_rate=0.510),
    _row("mmhal", "LLaVA-RLHF 13B", V1, score=2.02, hallucination_rate=0.625),
    _row("mmhal", "RLAIF-V 7B", V1, score=3.06, hallucination_rate=0.292),
    _row("mmhal", "RLAIF-V 12B", V1, score=3.36, hallucination_rate=0.292),
    _row("amber", "LLaVA-1.5-7B", V1, accuracy=0.735, f1=0.776),
    _row("amber", "LLaVA-RLHF 13B", V1, accuracy=0.797, f1=0.839),
    _row("amber", "OmniLMM-12B", V1, accuracy=0.865, f1=0.895),
    _row("amber", "RLAIF-V 7B", V1, accuracy=0.768, f1=0.845),
    _row("amber", "RLAIF-V 12B", V1, accuracy=0.880, f1=0.909),
    _row("amber", "GPT-4V", V1, accuracy=0.834, f1=0.874),
    _row("refomb", "LLaVA-1.5-7B", V1, trust=0.308, win=0.121),
    _row("refomb", "LLaVA-RLHF 13B", V1, trust=0.263, win=0.172),
    _row("refomb", "RLAIF-V 7B", V1, trust=0.475, win=0.207),
)

# What the published protocol is, as a scorer of ours names it in `Scores.settings` and counts it.
_PROTOCOLS = {
    "object_halbench": {
        "judge": "gpt-3.5-turbo-0613",
        "prompt": "published",
        "nouns": "en_core_web_trf",
        "vocabulary": "synonyms_refine.txt",
        "n": 300,
    },
    "mmhal": {
        "judge": "gpt-4-1106-preview",
        "prompt": "published",
        "unreadable_replies": "count as 0 (published rule)",
        "n": 96,
    },
    "amber": {"n_yes_no": 14216},
    "refomb": {"judge": "gpt-4-1106-preview", "prompt": "published", "split": "of the paper"},
}


HEADLINES = {
    "chair": ("chair_s", "chair_i", "recall", "mean_words"),
    "object_halbench": ("chair_s_refine", "chair_i", "recall", "mean_words"),
    "amber": ("chair", "hal", "cog", "cover", "mean_words", "accuracy", "f1", "yes_ratio"),
    "mmhal": ("hallucination_rate", "score", "informativeness", "mean_words"),
    "refomb": ("trust", "win", "overall", "mean_words"),
    "pope": ("accuracy", "precision", "recall", "f1", "yes_ratio"),
}
"""What a report shows of a benchmark: its hallucination rates, and what tells saying less from knowing more."""


def differences(scores: Scores) -> list[str]:
    """What keeps a score from being compared with the published rows; empty when nothing does.

    RefoMB's released questions are its development split, which no row of the paper is known to be of: never empty.
    """
    if scores.benchmark not in _PROTOCOLS:
        return [f"no published row of {scores.benchmark} is kept here"]
    found = []
    for name, wanted in _PROTOCOLS[scores.benchmark].items():
        given = {**scores.counts, **scores.settings}.get(name, "unknown")
        same = str(given).startswith("published ") if wanted == "published" else given == wanted
        if not same:
            found.append(f"{name}: {given}, published: {wanted}")
    if scores.missing:
        found.append(f"{len(scores.missing)} rows are not scored")
    return found


def table(scores: Scores, model: str) -> list[dict]:
    """Our score above the published rows of its benchmark, ready for a data frame.

    Returns:
        Rows {"model", "source", metrics…, "comparable", "because"}; "because" says why ours is not comparable.
    """
    published = [row for row in ROWS if row.benchmark == scores.benchmark]
    names = list(dict.fromkeys(name for row in published for name in row.metrics))
    reasons = differences(scores)
    ours = {name: scores.metrics.get(name) for name in names}
    first = {"model": model, "source": "this run", **ours, "comparable": not reasons, "because": "; ".join(reasons)}
    others = [
        {"model": row.model, "source": row.source, **{name: row.metrics.get(name) for name in names}}
        for row in published
    ]
    return [first, *others]


def rates_table(results: Mapping[str, Mapping]) -> list[dict]:
    """The headline rates of `score`, ready for a data frame: each with its 95 % interval, in percent unless a mean."""
    rows = []
    for name, result in results.items():
        for rate in HEADLINES[result["kind"]]:
            if rate in result["intervals"]:
                scale = 1 if rate in result["means"] else 100
                low, high = (scale * bound for bound in result["intervals"][rate])
                value = scale * result["metrics"][rate]
                unit = "" if scale == 1 else "%"
                rows.append({"benchmark": name, "rate": rate, "value": value, "low": low, "high": high, "unit": unit})
    return rows


def print_table(rows: Sequence[Mapping]) -> None:
    """Print `table`, rates in percent."""
    names = [name for name in rows[0] if name not in ("model", "source", "comparable", "because")]
    print(f"{'':>24}", *(f"{name:>20}" for name in names), " source")
    for row in rows:
        values = [row[name] for name in names]
        cells = [
            "-" if v is None else f"{v:.2f}" if n == "score" else f"{100 * v:.1f} %"
            for n, v in zip(names, values, strict=True)
        ]
        print(f"{row['model']:>24}", *(f"{cell:>20}" for cell in cells), "", row["source"])
    if not rows[0]["comparable"]:
        print(f"not comparable: {rows[0]['because']}")
