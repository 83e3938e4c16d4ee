"""POPE (arXiv 2305.10355): does the model say "yes" about objects that are not in the image?

    python -m rlaifv.benchmarks.pope --answers answers.jsonl --questions coco_pope_adversarial.json --json

Answers are aligned with the questions by `question_id`, never by position, and where the answer file repeats
the questions they must be the same: a file that was cut or shuffled is refused, with the ids that differ.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlaifv import ROOT
from rlaifv.benchmarks.cli import command, run
from rlaifv.benchmarks.spec import Spec
from rlaifv.evaluation.answers import Answer, image_keys, lookup, plain, read_answers, read_json_objects
from rlaifv.evaluation.scores import Scores
from rlaifv.params import BenchmarkParams

_ID_FIELDS = ("question_id", "id", "doc_id")


@dataclass(frozen=True)
class PopeQuestion:
    """One yes/no question; `label` is "yes" or "no", `category` the split where a file holds several."""

    id: str
    text: str
    label: str
    image: str = ""
    category: str = ""


def read_questions(path: str | Path) -> list[PopeQuestion]:
    """The questions of a POPE file, or of an lmms-eval sample file, which carries its questions and labels.

    Raises:
        ValueError: a row that does not parse, a label other than yes and no, or two questions with one id.
    """
    records, bad = read_json_objects(path)
    if bad:
        raise ValueError(f"{path}, {bad[0]['id']}: {bad[0]['reason']}")
    questions: dict[str, PopeQuestion] = {}
    for number, record in enumerate(records):
        split = lookup(record, ("category",))
        identity = _in_split(split, lookup(record, _ID_FIELDS) or str(number))
        wrapped = "doc" in record or "question" in record  # then "text" and "answer" are not what they are in POPE's
        text = lookup(record, ("question", "prompt") if wrapped else ("text",))
        label = (lookup(record, ("label", "target")) or lookup(record.get("doc", record), ("answer",))).lower()
        if not label:
            raise ValueError(f"{path}: row {number + 1} has no label: give a file of POPE's questions (--questions)")
        if label not in ("yes", "no"):
            raise ValueError(f"{path}: question {identity} has the label {label!r}, expected yes or no")
        if identity in questions:
            raise ValueError(f"{path}: two questions have the id {identity}; give one split at a time")
        image = lookup(record, ("image", "image_source", "image_id"))
        questions[identity] = PopeQuestion(identity, text, label, image, split)
    return list(questions.values())


def _in_split(split: str, identity: str) -> str:
    """A question's id; lmms-eval keeps the three splits in one file, where each numbers its questions from 1."""
    return f"{split} {identity}".strip()


def says_yes(text: str) -> bool:
    """The published rule: "no" when the first sentence has the word No, no or not, and "yes" otherwise."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def is_clear(text: str) -> bool:
    """Whether a reader would take the answer as the published rule does.

    The rule takes every answer without its words for a yes: an empty one, "NO", "no!" and "There isn't one" too.
    """
    first = text.split(".")[0]
    yes, no = (re.search(rf"\b({words})\b", first, re.IGNORECASE) is not None for words in ("yes", "no|not"))
    return yes != no and yes == says_yes(text)


def align(questions: Sequence[PopeQuestion], answers: Iterable[Answer]) -> tuple[dict[str, Answer], list[dict]]:
    """Question id → its answer, and a list of what has no partner.

    Raises:
        ValueError: answers about other questions or images under the same ids, or two answers to a question.
    """
    by_id = {question.id: question for question in questions}
    found: dict[str, Answer] = {}
    missing, twice, wrong = [], [], []
    answers = list(answers)
    if not all(map(_has_id, answers)):
        raise ValueError(
            "answers have no question_id; without it nothing says which question they belong to: add POPE's to each row"
        )
    for answer in answers:
        split = lookup(answer.record, ("category",))
        identity = next((key for key in (_in_split(split, answer.id), answer.id) if key in by_id), answer.id)
        question = by_id.get(identity)
        if question is None:
            missing.append({"id": identity, "reason": "answer to no question of this file"})
        elif identity in found:
            twice.append(identity)
        else:
            found[identity] = answer
            if not _same(question, answer):
                wrong.append(identity)
    if wrong:
        question, answer = by_id[wrong[0]], found[wrong[0]]
        raise ValueError(
            f"{len(wrong)} of {len(found)} answers belong to other questions than their ids say (id "
            f"{wrong[0]}: {question.text!r} {question.image} against {answer.question!r} {answer.image}); use "
            f"the answer file that was made for these questions. Ids that do not match: {', '.join(wrong)}"
        )
    if twice:
        raise ValueError(f"{len(twice)} questions are answered twice: {', '.join(twice)}")
    if not found:
        ids = f"{questions[0].id} … {questions[-1].id}"
        given = [row["id"] for row in missing]
        raise ValueError(f"no answer has an id of the questions ({ids}); the answers' ids: {', '.join(given)}")
    missing += [{"id": q.id, "reason": "no answer to this question"} for q in questions if q.id not in found]
    return found, missing


def _has_id(answer: Answer) -> bool:
    """False without POPE's id; the number of an lmms-eval row (doc_id) needs a question or an image to confirm it."""
    if not answer.record or lookup(answer.record, ("question_id", "id")):
        return True
    return bool(lookup(answer.record, ("doc_id",)) and (answer.question or answer.image))


def _same(question: PopeQuestion, answer: Answer) -> bool:
    """False when the answer names another question or another image."""
    if question.text and answer.question and plain(question.text) not in plain(answer.question):
        return False
    keys = set(image_keys(question.image)) & set(image_keys(answer.image))
    return not (question.image and answer.image) or bool(keys)


def score(questions: Sequence[PopeQuestion], answers: Iterable[Answer]) -> Scores:
    """Accuracy, precision, recall, F1 (positive class: yes) and the share of yes answers.

    Raises:
        ValueError: questions and answers that are not aligned (`align`).
    """
    found, missing = align(questions, answers)
    rows = []
    for question in questions:
        if question.id in found:
            answer = found[question.id]
            yes, truth = says_yes(answer.text), question.label == "yes"
            rows.append(
                {
                    "id": question.id,
                    "category": question.category,
                    "label": question.label,
                    "answer": "yes" if yes else "no",
                    "correct": yes == truth,
                    "clear": is_clear(answer.text),
                    "text": answer.text,
                }
            )
    rates = yes_no_rates(rows, positive="yes")
    for category in sorted({row["category"] for row in rows} - {""}):
        for name, sums in yes_no_rates(rows, "yes", lambda row, here=category: row["category"] == here).items():
            rates[f"{category}_{name}"] = sums
    cells = {
        f"{'t' if row_correct else 'f'}{'p' if answer == 'yes' else 'n'}": sum(
            row["correct"] == row_correct and row["answer"] == answer for row in rows
        )
        for row_correct in (True, False)
        for answer in ("yes", "no")
    }
    counts = {"n": len(rows), **cells, "n_unclear": sum(not row["clear"] for row in rows)}
    return Scores("pope", rows, rates, counts, {"alignment": "question id"}, missing)


def yes_no_rates(
    rows: Sequence[Mapping], positive: str, chosen=lambda row: True
) -> dict[str, tuple[list[int], list[int]]]:
    """Accuracy, precision, recall, F1 and yes ratio as sums over rows with "label", "answer" and "correct".

    F1 = 2 TP / (2 TP + FP + FN), which is the harmonic mean of precision and recall.
    """
    inside = [int(chosen(row)) for row in rows]
    said = [i * (row["answer"] == positive) for i, row in zip(inside, rows, strict=True)]
    true = [i * (row["label"] == positive) for i, row in zip(inside, rows, strict=True)]
    hits = [s * t for s, t in zip(said, true, strict=True)]
    return {
        "accuracy": ([i * row["correct"] for i, row in zip(inside, rows, strict=True)], inside),
        "precision": (hits, said),
        "recall": (hits, true),
        "f1": ([2 * hit for hit in hits], [s + t for s, t in zip(said, true, strict=True)]),
        "yes_ratio": ([i * (row["answer"] == "yes") for i, row in zip(inside, rows, strict=True)], inside),
    }


def score_entry(item: BenchmarkParams, answers: Path, judge: None, replies: Path) -> tuple[Scores, list[dict]]:
    """Score one entry of the parameter file (`spec.Scorer`)."""
    given, bad = read_answers(answers)
    return score(read_questions(ROOT / item.questions[0]), given), bad


SPEC = Spec("pope", score_entry, headlines=("accuracy", "precision", "recall", "f1", "yes_ratio"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: read, align, score, print."""
    parser = command("pope", "POPE: yes or no about objects that are and are not in the image")
    parser.add_argument("--questions", help="one split of POPE; default: questions and labels of an lmms-eval file")
    options = parser.parse_args(arguments)

    def scorer(path):
        answers, bad = read_answers(path)
        return score(read_questions(options.questions or path), answers), bad

    run(options, scorer, SPEC)


if __name__ == "__main__":
    main()
