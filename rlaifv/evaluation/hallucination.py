"""Evaluate: hallucination and recall of a model's greedy (or beam search) answers, and its yes/no accuracy.

Where a split's images are annotated, the numbers are those of CHAIR and its Object HalBench variant
(rlaifv.evaluation.chair): the same code scores the embedded world and real COCO. Where nobody has said what is in the
images, a labeler judges the answers' claims (rlaifv.evaluation.claims), and the numbers are those of
rlaifv.evaluation.claim_rates. Everything here takes the rows of either.
"""

import dataclasses
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rlaifv.evaluation import chair
from rlaifv.evaluation.answers import Answer
from rlaifv.evaluation.bootstrap import compare_paired, intervals
from rlaifv.evaluation.claim_rates import score_claims
from rlaifv.evaluation.scores import Scores
from rlaifv.inference.decoding import fit_answers
from rlaifv.inference.roles import Model, look
from rlaifv.inference.sampling import Prompt
from rlaifv.inference.yes_no import judge_fit
from rlaifv.params import EvaluateParams
from rlaifv.records import (
    IMAGE_PLACES,
    RATES,
    Instruction,
    Reject,
    batched,
    read_jsonl,
    read_records,
    text_of,
    write_jsonl,
    yes_share,
)
from rlaifv.stage import ANNOTATIONS, annotations
from rlaifv.store import Store
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.loading import loaded

log = logging.getLogger(__name__)

P = ("p_yes", "p_no")

CHAIR_RATES = dict(zip(RATES, ("chair_s_refine", "chair_i", "recall"), strict=True))
"""Our names of the rates → CHAIR's."""


@dataclass(frozen=True)
class Question:
    """A yes/no question with its true answer."""

    id: str
    image_path: str
    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Split:
    """An evaluation split: instructions, the true COCO classes of each image id, the id of each image file name, and
    yes/no questions (maybe none). One that is not `annotated` knows no classes: its answers are judged by claims."""

    name: str
    instructions: list[Instruction]
    objects: dict[str, set[str]]
    image_ids: dict[str, str]
    questions: list[Question]
    image_root: Path
    annotated: bool = True


def load_split(name: str, prepared: Path, image_root: Path) -> Split:
    """Read a prepared split; an image's classes are those of its instances and of its reference captions."""
    instructions = read_records(prepared / f"{name}.jsonl", Instruction)
    instances, captions, asked = (annotations(prepared, name, kind) for kind in ANNOTATIONS)
    questions = [read_question(row, asked) for row in (read_jsonl(asked) if asked.is_file() else [])]
    if not instances.is_file():
        return Split(name, instructions, {}, {}, questions, image_root, annotated=False)
    objects = chair.load_objects(path for path in (instances, captions) if path.is_file())
    images = json.loads(instances.read_text())["images"]
    image_ids = {image["file_name"]: str(image["id"]) for image in images}
    if unknown := [i.id for i in instructions if Path(i.image_path).name not in image_ids]:
        raise ValueError(f"{instances} knows no image of {len(unknown)} {name} instructions, first {unknown[0]}")
    return Split(name, instructions, objects, image_ids, questions, image_root)


def read_question(row: dict, file: Path) -> Question:
    """A row of a file of yes/no questions; ValueError names the file, the row and the field that cannot be used."""
    try:
        question = Question(*(text_of(row, field.name) for field in dataclasses.fields(Question)))
        if question.answer not in ("yes", "no"):
            raise ValueError(f"the answer is yes or no, got {question.answer!r:.40}")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{file}: {str(row)[:60]}: {error}") from None
    return dataclasses.replace(question, question=IMAGE_PLACES.sub("", question.question))


def model_answers(vlm: Model, split: Split, params: EvaluateParams) -> list[dict[str, str]]:
    """The model's answer to every instruction: rows of `id`, `image`, `question`, `answer`; with a `reason` in the
    answer's place where the question cannot be put to this model (one of its special tokens, a context too short)."""
    rows = []
    for chunk in batched(split.instructions, params.batch_size):
        prompts = [Prompt(look(vlm, split.image_root / i.image_path), i.question) for i in chunk]
        answers = fit_answers(vlm, prompts, params.beams, params.max_new_tokens, params.repetition_penalty)
        rows += [
            {"id": i.id, "image": i.image_path, "question": i.question}
            | ({"reason": str(answer)} if isinstance(answer, UnfitText) else {"answer": answer})
            for i, answer in zip(chunk, answers, strict=True)
        ]
    tell_left_out(f"{split.name} instructions", vlm, rows)
    return rows


def left_out(rows: Sequence[dict]) -> list[dict]:
    """`id` and `reason` of the rows that a model was not asked."""
    return [{"id": row["id"], "reason": row["reason"]} for row in rows if "reason" in row]


def tell_left_out(what: str, vlm: Model, rows: Sequence[dict]) -> None:
    """A log line of the rows that `vlm` was not asked."""
    if lost := left_out(rows):
        first = f"the first, {lost[0]['id']}: {lost[0]['reason']}"
        log.warning(f"{len(lost)} of {len(rows)} {what} cannot be put to {vlm.name} and do not count; {first}")


def score_answers(answers: Sequence[dict], split: Split) -> Scores:
    """CHAIR scores of a list of answers in Object HalBench's counting, or those of their claims where the split is not
    annotated; ValueError when one cannot be scored."""
    if not split.annotated:
        return score_claims(answers)
    named = [Answer(r["id"], r["answer"], image=split.image_ids[Path(r["image"]).name]) for r in answers]
    scores = chair.score(named, split.objects, counting="unique")
    if scores.missing:
        raise ValueError(f"{len(scores.missing)} answers cannot be scored, first: {scores.missing[0]}")
    return scores


def rate_names(scores: Scores) -> dict[str, str]:
    """Our names of the rates → the scorer's."""
    return CHAIR_RATES if scores.benchmark == "chair" else {name: name for name in scores.rates}


def hallucination(answers: Sequence[dict], split: Split) -> dict[str, object]:
    """Rates of a list of answers, with what tells saying less from knowing more beside them.

    `response_hallucination` = answers with a hallucinated object / answers that mention any object;
    `mention_hallucination` = hallucinated / all mentions, surface words counted once an answer; `recall`. By claims
    they are those of `score_claims`, with who judged (`labeler`, and whether that is the `same_labeler` that made the
    feedback). `<rate>_interval` is its 95 % bootstrap interval over answers.
    """
    scores = score_answers(answers, split)
    metrics, bounds = scores.metrics, intervals(scores)
    others = {key: metrics[key] for key in ("chair_s", "mean_words", "n")} if split.annotated else scores.counts
    return {
        **{name: metrics[rate] for name, rate in rate_names(scores).items()},
        **{f"{name}_interval": bounds[rate] for name, rate in rate_names(scores).items()},
        **others,
        **({} if split.annotated else scores.settings),
    }


def paired_test(base: Sequence[dict], aligned: Sequence[dict], split: Split) -> dict[str, dict[str, object]]:
    """The aligned model against the base on the same rows: for each rate of `hallucination` both values, their
    `difference` with its 95 % `interval`, and the two-sided `p_value` of the same resamples."""
    scores = score_answers(base, split), score_answers(aligned, split)
    names = rate_names(scores[0])
    tests = compare_paired(*scores, list(names.values()))
    return {
        name: {
            "base": test.a,
            "aligned": test.b,
            "difference": test.difference,
            "interval": [test.low, test.high],
            "p_value": test.p_value,
            "n": test.n,
        }
        for name, test in zip(names, tests, strict=True)
    }


def answer_questions(vlm: Model, split: Split, suffix: str, batch_size: int) -> list[dict[str, object]]:
    """The model's p_yes and p_no for every yes/no question of the split; a `reason` in their place where the image
    cannot be read or the question cannot be put to this model."""
    by_image: dict[str, list[Question]] = defaultdict(list)
    for question in split.questions:
        by_image[question.image_path].append(question)
    rows = []
    for chunk in batched(sorted(by_image.items()), batch_size):
        groups, items = [], []
        for path, group in chunk:
            try:
                items.append((look(vlm, split.image_root / path), [f"{q.question} {suffix}" for q in group]))
                groups.append(group)
            except (OSError, ValueError) as error:
                rows += [{"id": q.id, "type": q.type, "answer": q.answer, "reason": str(error)} for q in group]
        for group, answers in zip(groups, judge_fit(vlm, items), strict=True):
            rows += [
                {"id": q.id, "type": q.type, "answer": q.answer}
                | ({"reason": str(answer)} if isinstance(answer, UnfitText) else dict(zip(P, answer, strict=True)))
                for q, answer in zip(group, answers, strict=True)
            ]
    tell_left_out(f"{split.name} questions", vlm, rows)
    if lost := [row["id"] for row in rows if "p_yes" in row and not math.isfinite(row["p_yes"] + row["p_no"])]:
        count = f"{len(lost)} of {len(rows)} questions"
        raise FloatingPointError(f"{vlm.name}: P(yes) and P(no) of {count} are not finite, first of {lost[0]}")
    return rows


def yes_no_metrics(rows: Sequence[dict[str, object]]) -> dict[str, object]:
    """Accuracy and F1 (positive class "yes"), overall and accuracy per question type; a tie counts as "no".

    `n` and, where there are any, `rejects` (the questions that were not asked, and why) add up to the questions.
    """
    rejects = {"rejects": lost} if (lost := left_out(rows)) else {}
    rows = [row for row in rows if "reason" not in row]
    if not rows:
        return {"n": 0, **rejects}
    truth = np.array([row["answer"] == "yes" for row in rows])
    said = np.array([row["p_yes"] > row["p_no"] for row in rows])
    hits = truth & said
    types = np.array([row["type"] for row in rows])
    return {
        "accuracy": float((truth == said).mean()),
        "f1": float(2 * hits.sum() / max(truth.sum() + said.sum(), 1)),
        "per_type": {str(t): float((truth == said)[types == t].mean()) for t in sorted(set(types))},
        "n": len(rows),
        **rejects,
    }


def calibration(rows: Sequence[dict[str, object]], bins: int = 10) -> list[dict[str, float]]:
    """A reliability diagram of answered questions: for each bin of P(yes) among yes and no that is not empty, its mean
    `p_yes`, the share whose true answer is `yes`, and `n`."""
    asked = [row for row in rows if "reason" not in row]
    share = np.array([yes_share(row["p_yes"], row["p_no"]) for row in asked])
    truth = np.array([row["answer"] == "yes" for row in asked])
    bin_of = np.minimum((share * bins).astype(int), bins - 1)
    return [
        {"p_yes": float(share[of].mean()), "yes": float(truth[of].mean()), "n": int(of.sum())}
        for of in (bin_of == number for number in range(bins))
        if of.any()
    ]


def ask(vlm: Model, split: Split, params: EvaluateParams, suffix: str) -> tuple[list[dict], list[dict]]:
    """What one model says on one split: `model_answers` and `answer_questions`."""
    return model_answers(vlm, split, params), answer_questions(vlm, split, suffix, params.batch_size)


def share(split: Split, number: int, of: int) -> Split:
    """One of `of` shares of a split: together they are all of it, and an image's yes/no questions are in one."""
    images = set(sorted({question.image_path for question in split.questions})[number::of])
    questions = [question for question in split.questions if question.image_path in images]
    return dataclasses.replace(split, instructions=split.instructions[number::of], questions=questions)


def score(answers: Sequence[dict], asked: Sequence[dict[str, object]], split: Split) -> dict[str, object]:
    """All metrics of what `ask` returned, judged where the split is not annotated.

    `n` and, where there are any, `rejects` (the instructions that were not asked, and why) add up to the split's.
    Raises ValueError where they do not, and where nothing was asked.
    """
    lost = left_out(answers)
    answered = [row for row in answers if "reason" not in row]
    if not answered and lost:
        raise ValueError(f"none of {len(lost)} {split.name} instructions can be asked; the first: {lost[0]['reason']}")
    metrics = hallucination(answered, split)
    if metrics["n"] + len(lost) != len(split.instructions):
        count = f"{metrics['n']} answers and {len(lost)} rejects"
        raise ValueError(f"{count} are not the {len(split.instructions)} {split.name} instructions")
    return {**metrics, **({"rejects": lost} if lost else {}), "yes_no": yes_no_metrics(asked)}


def measure(vlm: Model, split: Split, params: EvaluateParams, suffix: str) -> tuple[dict, list[dict[str, str]]]:
    """All metrics of one model on one split, and the rows with its answers."""
    answers, asked = ask(vlm, split, params, suffix)
    return score(answers, asked, split), [row for row in answers if "reason" not in row]


def evaluate_checkpoints(
    checkpoints: Sequence[Path],
    split: Split,
    params: EvaluateParams,
    suffix: str,
    store: Store,
    load: Callable[[Path], Model],
    out: Path,
    judge: Callable[[Sequence[dict]], list[dict]] | None = None,
) -> list[dict]:
    """Metrics of every checkpoint on `split`, one row each, written to `out`; `load` turns a folder into a model.

    One that was scored when it was written (`training.dev_scores`) has its row beside it, and maybe no weights now.
    A split that is not annotated needs `judge` (`claims.claim_judge`), which gives the answers their judged claims: it
    comes when all checkpoints have answered, so that its models are loaded once; the answers are kept beside `out`.
    ValueError when it can judge none of them.
    """

    def measure_one(folder: Path) -> tuple[list[dict], list[Reject]]:
        if (scored := folder.with_suffix(".json")).is_file():
            return [json.loads(scored.read_text())], []
        with loaded(partial(load, folder)) as policy:
            answers, asked = ask(policy(), split, params, suffix)
        row = {"answers": answers, "asked": asked} if judge else score(answers, asked, split)
        return [{"checkpoint": folder.name, **row}], []

    store.run(checkpoints, measure_one)
    said = out.with_name("answers.jsonl") if judge else out
    store.publish(said, len(checkpoints), max_reject_rate=0)
    rows = read_jsonl(said)
    if judge:
        judged = iter(judge([answer for row in rows for answer in row["answers"]]))
        of_each = [[next(judged) for _ in row["answers"]] for row in rows]
        rows = [
            {"checkpoint": row["checkpoint"], **score(answers, row["asked"], split)}
            for row, answers in zip(rows, of_each, strict=True)
        ]
        if not any(answer.get("claims") for answers in of_each for answer in answers):
            problems = [a["problem"] for answers in of_each for a in answers if a.get("problem")]
            why = f"the first: {problems[0]}" if problems else "the divider found none"
            raise ValueError(f"no answer to {split.name} has a claim that could be judged; {why}")
        write_jsonl(out, rows)
    return rows
