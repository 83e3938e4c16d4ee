"""Check finished answers claim by claim: for the report's gallery and for people who browse."""

from collections.abc import Sequence
from pathlib import Path

from rlaifv.inference.yes_no import judge_fit, load_labeler
from rlaifv.params import DivideParams
from rlaifv.records import ModelRecord
from rlaifv.steps.divide import divide_answers
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import load_model


def judged_claims(
    divider: ModelRecord,
    labeler: ModelRecord,
    answers: Sequence[dict],
    params: DivideParams,
    seed: int,
    image_root: Path,
    suffix: str,
) -> list[dict]:
    """`answers` (rows of `question`, `answer`, `image`) with why one could not be divided (`problem`) and their
    `claims`: rows of `claim`, `question`, and the labeler's `p_yes` and `p_no`. The two models are in memory one after
    the other."""
    divisions = divide_answers(load_model(divider), [(row["question"], row["answer"]) for row in answers], params, seed)
    items = [
        (open_image(image_root / row["image"]), [f"{question} {suffix}" for question in division.questions])
        for row, division in zip(answers, divisions, strict=True)
    ]
    found = []
    for row, division, judged in zip(answers, divisions, judge_fit(load_labeler(labeler), items), strict=True):
        unfit = next((str(answer) for answer in judged if isinstance(answer, UnfitText)), "")
        claims = [
            {"claim": claim, "question": question, "p_yes": answer[0], "p_no": answer[1]}
            for claim, question, answer in zip(division.claims, division.questions, judged, strict=True)
            if not isinstance(answer, UnfitText)
        ]
        found.append({**row, "problem": division.problem or unfit, "claims": claims})
    return found
