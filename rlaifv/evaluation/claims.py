"""Check finished answers claim by claim: for the report's gallery and for people who browse."""

from collections.abc import Sequence
from pathlib import Path

from rlaifv.inference.yes_no import judge_many, load_labeler
from rlaifv.params import DivideParams
from rlaifv.records import ModelRecord
from rlaifv.steps.divide import divide_answers
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM, load_model


def judged_claims(
    divider: ModelRecord,
    labeler: ModelRecord,
    answers: Sequence[dict],
    params: DivideParams,
    seed: int,
    image_root: Path,
    suffix: str,
) -> list[dict]:
    """`answers` (rows of `question`, `answer`, `image`) with their claims and what the labeler says of each; the two
    models are in memory one after the other."""
    return judge_rows(
        load_labeler(labeler), divide_rows(load_model(divider), answers, params, seed), image_root, suffix
    )


def divide_rows(divider: VLM, answers: Sequence[dict], params: DivideParams, seed: int) -> list[dict]:
    """`answers` (rows of `question`, `answer`, ...) with their `claims`: rows of `claim`, `question`."""
    divisions = divide_answers(divider, [(row["question"], row["answer"]) for row in answers], params, seed)
    return [
        {
            **row,
            "problem": division.problem,
            "claims": [
                {"claim": claim, "question": question}
                for claim, question in zip(division.claims, division.questions, strict=True)
            ],
        }
        for row, division in zip(answers, divisions, strict=True)
    ]


def judge_rows(labeler: VLM, rows: Sequence[dict], image_root: Path, suffix: str) -> list[dict]:
    """Rows of `divide_rows` with the labeler's `p_yes` and `p_no` in every claim."""
    items = [
        (open_image(image_root / row["image"]), [f"{claim['question']} {suffix}" for claim in row["claims"]])
        for row in rows
    ]
    return [
        {
            **row,
            "claims": [
                {**claim, "p_yes": p_yes, "p_no": p_no}
                for claim, (p_yes, p_no) in zip(row["claims"], answers, strict=True)
            ],
        }
        for row, answers in zip(rows, judge_many(labeler, items), strict=True)
    ]
