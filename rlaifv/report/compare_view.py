"""Two iterations' answers to the same test images, in a notebook: what training mended, and what it cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from rlaifv.evaluation.hallucination import Split, score_answers
from rlaifv.report.render import render

OUTCOMES = ("mended", "new error", "wrong before and after", "fewer objects", "the same objects")
"""What can have become of an answer, the first that holds."""


def compare(before: Sequence[Mapping], after: Sequence[Mapping], split: Split) -> list[dict]:
    """A row for each test image: `id`, `image`, `question`, the two answers, the `wrong` and the `right` things that
    each names (objects; of images that nobody annotated, rejected and accepted claims), and what became of it (`kind`).

    Raises ValueError unless both answer the same instructions.
    """
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise ValueError("the two iterations answer different test instructions: run the stage test of both")
    named = [things(answers, split) for answers in (before, after)]
    rows = []
    for first, second, (wrong, right), (wrong_now, right_now) in zip(before, after, *named, strict=True):
        row = {key: first[key] for key in ("id", "image", "question")}
        row |= {"before": first["answer"], "after": second["answer"]}
        row |= {"wrong": [wrong, wrong_now], "right": [right, right_now]}
        rows.append(row | {"kind": outcome_of(wrong, wrong_now, right, right_now)})
    return rows


def things(answers: Sequence[Mapping], split: Split) -> list[tuple[list[str], list[str]]]:
    """(wrong, right) of each answer."""
    if split.annotated:
        return [(row["hallucinated_classes"], row["covered"]) for row in score_answers(answers, split).rows]
    verdicts = [[(claim["claim"], claim["p_yes"] > claim["p_no"]) for claim in row["claims"]] for row in answers]
    return [([text for text, yes in row if not yes], [text for text, yes in row if yes]) for row in verdicts]


def outcome_of(wrong: Sequence, wrong_now: Sequence, right: Sequence, right_now: Sequence) -> str:
    """One of `OUTCOMES`."""
    if wrong and wrong_now:
        return OUTCOMES[2]
    if wrong or wrong_now:
        return OUTCOMES[0] if wrong else OUTCOMES[1]
    return OUTCOMES[3] if len(right_now) < len(right) else OUTCOMES[4]


def counts(rows: Sequence[Mapping]) -> dict[str, int]:
    """Kind → number of answers, of all `OUTCOMES`."""
    found = Counter(row["kind"] for row in rows)
    return {kind: found[kind] for kind in OUTCOMES}


def page(row: Mapping, names: Sequence[str], image_root: Path) -> Markup:
    """HTML of one row, under the names of the two iterations."""
    return render("compare.html", row=row, names=names, image=image_root / row["image"])
