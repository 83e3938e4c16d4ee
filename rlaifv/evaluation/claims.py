"""Check finished answers claim by claim: for the report's gallery, for people who browse, and for whole splits whose
images nobody has annotated."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlaifv.fingerprint import digest
from rlaifv.inference.roles import load_role, look
from rlaifv.inference.yes_no import judge_fit
from rlaifv.params import DivideParams, FeedbackParams, ServerParams
from rlaifv.records import Candidate, Claim, Judgement, ModelRecord, Reject, read_records
from rlaifv.stage import Stage
from rlaifv.steps.divide import NO_CLAIM, divide, divide_answers
from rlaifv.steps.feedback import feedback
from rlaifv.store import Store
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.loading import loaded

log = logging.getLogger(__name__)


def claim_judge(stage: Stage, image_root: Path, out: Path) -> Callable[[Sequence[dict]], list[dict]]:
    """What `judge_answers` is for a stage: by `evaluate.labeler` or, where that is null, by the labeler that made the
    feedback."""
    params = stage.params
    labeler = stage.model("second_labeler" if params.evaluate.labeler else "labeler")
    same = labeler.fingerprint == stage.model("labeler").fingerprint and not params.pairs.source
    return partial(
        judge_answers,
        divider=stage.model("divider"),
        labeler=labeler,
        same_labeler=same,
        params=(params.divide, params.feedback, stage.server),
        seed=params.seed,
        image_root=image_root,
        store=stage.store,
        out=out,
    )


def judge_answers(
    answers: Sequence[dict],
    divider: ModelRecord,
    labeler: ModelRecord,
    same_labeler: bool,
    params: tuple[DivideParams, FeedbackParams, ServerParams],
    seed: int,
    image_root: Path,
    store: Callable[[str], Store],
    out: Path,
) -> list[dict]:
    """Answers (rows of `id`, `image`, `question`, `answer`) as `claim_rates` takes them, in order: with their `claims`,
    the `problem` for which one could not be divided or judged, and who judged. A row without an answer stays as it is.

    They go through the method's own steps, whose files come to `out`: equal answers and equal questions are asked once,
    a killed run goes on, and the two models are in memory one after the other. `store` gives the store of a part.
    """
    dividing, judging, server = params
    said = {f"{n}/{row['id']}": row for n, row in enumerate(answers) if row.get("answer", "").strip()}
    about = {key: f"{row['image']} {row['question']}" for key, row in said.items()}
    asked = [Candidate(key, about[key], 0, row["answer"], 0, "stop", 0, "") for key, row in said.items()]
    work = digest([about, [row["answer"] for row in said.values()], labeler.fingerprint])
    files = out / "claims" / "claims.jsonl", out / "judgements" / "judgements.jsonl"
    divide(
        partial(load_role, divider, server),
        asked,
        {about[key]: row["question"] for key, row in said.items()},
        replace(dividing, max_reject_rate=1.0),
        seed,
        store(f"claims-{work}"),
        files[0],
    )
    claims = read_records(files[0], Claim)
    feedback(
        partial(load_role, labeler, server),
        claims,
        {key: row["image"] for key, row in said.items()},
        image_root,
        replace(judging, max_reject_rate=1.0),
        store(f"judgements-{work}"),
        files[1],
    )
    undivided, unjudged = (
        {reject.id: reject.reason for reject in read_records(file.with_name("rejects.jsonl"), Reject)} for file in files
    )
    problems = {key: reason for key, reason in undivided.items() if reason != NO_CLAIM}
    verdicts = {j.claim_id: j for j in read_records(files[1], Judgement)}
    judged: dict[str, list[dict]] = defaultdict(list)
    for claim in claims:
        if claim.id in unjudged:
            problems[claim.candidate_id] = unjudged[claim.id]
            continue
        verdict = verdicts[claim.id]
        row = {"claim": claim.claim, "question": claim.question, "p_yes": verdict.p_yes, "p_no": verdict.p_no}
        judged[claim.candidate_id].append(row)
    if problems:
        first = next(iter(problems.values()))
        log.warning(f"{len(problems)} of {len(said)} answers cannot be judged, they count as no claim; first: {first}")
    found = []
    for n, row in enumerate(answers):
        key = f"{n}/{row['id']}"
        claims_of_it = [] if key in problems else judged.get(key, [])
        verdicts_on_it = {"problem": problems.get(key, ""), "claims": claims_of_it}
        verdicts_on_it |= {"labeler": labeler.path, "same_labeler": same_labeler}
        found.append({**row, **verdicts_on_it} if "answer" in row else row)
    return found


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
    with loaded(partial(load_role, divider, server)) as model:
        divisions = divide_answers(model(), [(row["question"], row["answer"]) for row in answers], params, seed)
    with loaded(partial(load_role, labeler, server)) as model:
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
