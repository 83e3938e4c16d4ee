"""Check finished answers claim by claim: for the report's gallery and for people who browse."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rlaifv.inference.yes_no import judge_fit, load_labeler, look
from rlaifv.params import DivideParams, ServerParams
from rlaifv.records import ModelRecord
from rlaifv.steps.divide import divide_answers
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.loading import load_model, loaded


def judged_claims(
    divider: ModelRecord,
    labeler: ModelRecord,
    answers: Sequence[dict],
    params: DivideParams,
    seed: int,
    image_root: Path,
    suffix: str,
    server: ServerParams,
) -> list[dict]:
    """`answers` (rows of `question`, `answer`, `image`) with why one could not be divided (`problem`) and their
    `claims`: rows of `claim`, `question`, and the labeler's `p_yes` and `p_no`. The two models are in memory one after
    the other."""
    with loaded(partial(load_model, divider)) as model:
        divisions = divide_answers(model(), [(row["question"], row["answer"]) for row in answers], params, seed)
    with loaded(partial(load_labeler, labeler, server)) as model:
        items = [
            (look(model(), image_root / row["image"]), [f"{question} {suffix}" for question in division.questions])
            for row, division in zip(answers, divisions, strict=True)
        ]
        verdicts = judge_fit(model(), items)
    found = []
    for row, division, judged in zip(answers, divisions, verdicts, strict=True):
        unfit = next((str(answer) for answer in judged if isinstance(answer, UnfitText)), "")
        claims = [
            {"claim": claim, "question": question, "p_yes": answer[0], "p_no": answer[1]}
            for claim, question, answer in zip(division.claims, division.questions, judged, strict=True)
            if not isinstance(answer, UnfitText)
        ]
        found.append({**row, "problem": division.problem or unfit, "claims": claims})
    return found
