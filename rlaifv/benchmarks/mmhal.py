"""MMHal-Bench (arXiv 2309.14525): 96 questions whose answers a judge rates from 0 to 6.

    python -m rlaifv.benchmarks.mmhal --answers answers.json --judge NAME --base-url http://localhost:8000/v1 --json

Answers: the benchmark's own template with `model_answer` filled in, or any answer file together with `--template`.
The judge does not see the image but a list of what is in it, the question and a human's answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlaifv import ROOT
from rlaifv.benchmarks.cli import add_judge_options, cache_of, command, judge_of, run
from rlaifv.benchmarks.judge import Judge, Request, ask_all, prompt_label, published_prompt
from rlaifv.benchmarks.spec import V1, Spec, published
from rlaifv.evaluation.answers import Answer, plain, read_answers, read_json_objects
from rlaifv.evaluation.scores import Scores
from rlaifv.params import BenchmarkParams

PROMPT = """\
You are a fair and careful judge. Below is what an image contains, a question about the image, the answer of a human \
who saw it, and the answer of an AI assistant. Rate the assistant's answer.

Two things count. Is the answer informative, with details, analysis or reasoning that help? And does it contain a \
hallucination, that is, does it state something about the image that is not there or contradicts what is known of \
it: a wrong object, number, color, place, action or relation?

Mind that the human's answer is correct but short and does not list everything: a statement that goes beyond it is no \
hallucination unless it conflicts with what is known or could not be seen or inferred. General knowledge and \
reasoning are welcome. An answer that admits uncertainty or misses the point is uninformative, not hallucinated. A \
question may assume something that is not in the image; then the right answer says so.

### Image contents
{contents}

### Question
{question}

### Answer of the human
{reference}

### Answer of the assistant
{answer}

First explain your judgement in a few sentences. Then end with one line of the form "Rating: N", where N is
6: very informative, with good analysis or reasoning, no hallucination
5: very informative, no hallucination
4: somewhat informative, no hallucination
3: not informative, no hallucination
2: very informative, with hallucination
1: somewhat informative, with hallucination
0: not informative, with hallucination"""

_RATING = re.compile(r"rating\W{0,8}(\d+(?:\.\d+)?)", re.IGNORECASE)
_FAITHFUL = 3  # the lowest rating without a hallucination


@dataclass(frozen=True)
class Row:
    """One question of the benchmark and the answer to be rated."""

    id: str
    type: str
    contents: str
    question: str
    reference: str
    answer: str


def read_rows(answers: str | Path, template: str | Path | None = None) -> tuple[list[Row], list[dict]]:
    """The benchmark's rows with a model's answers, and the rows without one.

    An empty answer is an answer: the judge rates it, as the published scorer has it do.

    Args:
        answers: the filled template; or, with `template`, any answer file whose rows name their `image_id` and
            repeat the question, or have only the image or the template's row number as their id.

    Raises:
        ValueError: rows that are not MMHal's, or a template without any answer filled in.
    """
    given, missing = read_answers(answers)
    if template is None:
        records = [answer.record for answer in given]
        if not any(answer.text for answer in given):
            raise ValueError(f"{answers}: no model_answer is filled in")
    else:
        records, bad = read_json_objects(template)
        missing = [*missing, *bad]
    by_key: dict[tuple[str, str] | str, Answer] = {}
    for answer in given:
        key = (Path(answer.image).stem, plain(answer.question))
        if by_key.setdefault(key if all(key) else answer.id, answer) is not answer:
            missing.append({"id": answer.id, "reason": "a second answer to this question"})
            continue
        by_key.setdefault(answer.id, answer)
    rows = []
    for number, record in enumerate(records):
        absent = {"image_id", "image_content", "question", "gt_answer", "question_type"} - set(record)
        if absent:
            raise ValueError(f"row {number} of {template or answers} has no {', '.join(sorted(absent))}: not MMHal's")
        identity, question = str(record["image_id"]), str(record["question"])
        keys = ((identity, plain(question)), identity, str(number))
        answer = next((by_key[key] for key in keys if key in by_key), None)
        if answer is None or plain(answer.question) not in ("", plain(question)):
            missing.append({"id": identity, "reason": "no answer to this question"})
        else:
            contents = ", ".join(record["image_content"])
            row = Row(identity, record["question_type"], contents, question, record["gt_answer"], answer.text)
            rows.append(row)
    return rows, missing


def parse_rating(reply: str) -> int | None:
    """The rating 0-6 that a reply gives; None when it gives none, several different ones, or another number."""
    found = set(_RATING.findall(reply))
    rating = found.pop() if len(found) == 1 else ""
    return int(rating) if rating in set("0123456") else None


def parse_rating_published(reply: str) -> int:
    """The published rule: the only N with "rating: N" in the reply, and 0 where there is none or more than one."""
    found = [n for n in range(7) if f"rating: {n}" in reply.lower()]
    return found[0] if len(found) == 1 else 0


def score(rows: Sequence[Row], ratings: Mapping[str, int]) -> Scores:
    """Mean rating, hallucination rate and informativeness, overall, and the mean rating for each question type.

    - score: mean rating, 0-6
    - hallucination_rate: share of ratings below 3
    - informativeness: mean of (rating − 3 where the rating is at least 3, else the rating) / 3

    Args:
        ratings: row id → rating; rows without one count nowhere and are listed as missing.
    """
    rated = [row for row in rows if row.id in ratings]
    values = [ratings[row.id] for row in rated]
    ones = [1] * len(rated)
    rates = {
        "score": (values, ones),
        "hallucination_rate": ([int(value < _FAITHFUL) for value in values], ones),
        "informativeness": ([value - _FAITHFUL * (value >= _FAITHFUL) for value in values], [3] * len(rated)),
        "mean_words": ([len(row.answer.split()) for row in rated], ones),
    }
    types = list(dict.fromkeys(row.type for row in rows))
    for name in types:
        inside = [int(row.type == name) for row in rated]
        rates[f"score_{name}"] = ([i * value for i, value in zip(inside, values, strict=True)], inside)
    table = [
        {"id": row.id, "type": row.type, "rating": ratings[row.id], "hallucinated": ratings[row.id] < _FAITHFUL}
        for row in rated
    ]
    missing = [{"id": row.id, "reason": "no rating"} for row in rows if row.id not in ratings]
    means = ("score", *(f"score_{name}" for name in types), "mean_words")
    return Scores("mmhal", table, rates, {"n": len(rated)}, {}, missing, means)


def judge_and_score(
    rows: Sequence[Row],
    judge: Judge,
    cache: str | Path | None = None,
    attempts: int = 3,
    strict_published: bool = False,
    prompt_file: str | Path | None = None,
) -> Scores:
    """Ask the judge about every row and score what it says.

    Args:
        strict_published: take a reply without exactly one "Rating: N" for a rating of 0, as the published scorer
            does; default: ask again up to `attempts` times, then list the row.
        prompt_file: the published scorer's `eval_gpt_mmhal.py`, to use its prompt instead of ours.
    """
    template = published_prompt(prompt_file, "template") if prompt_file else PROMPT
    requests = []
    for row in rows:
        parts = {"contents": row.contents, "question": row.question, "reference": row.reference, "answer": row.answer}
        requests.append(Request(row.id, template.format(*parts.values(), **parts)))
    parse = parse_rating_published if strict_published else parse_rating
    judged = ask_all(requests, judge, parse, cache, attempts)
    result = score(rows, judged.verdicts)
    for row in result.rows:
        row["reply"] = judged.replies[row["id"]]
    counts = {**result.counts, "n_unparsed": len(judged.unparsed), "n_without_verdict": len(judged.missing)}
    settings = {
        "judge": judge.name,
        "prompt": prompt_label(template, bool(prompt_file)),
        "unreadable_replies": "count as 0 (published rule)" if strict_published else "asked again, then listed",
    }
    return replace(result, counts=counts, settings=settings, missing=judged.missing)


def score_entry(item: BenchmarkParams, answers: Path, judge: Judge, replies: Path) -> tuple[Scores, list[dict]]:
    """Score one entry of the parameter file (`spec.Scorer`)."""
    rows, bad = read_rows(answers, ROOT / item.questions[0])
    strict, (prompt,) = item.judge.strict_published, item.judge.prompts or (None,)
    prompt_file = ROOT / prompt if prompt else None
    return judge_and_score(rows, judge, replies, strict_published=strict, prompt_file=prompt_file), bad


SPEC = Spec(
    kind="mmhal",
    score=score_entry,
    headlines=("hallucination_rate", "score", "informativeness", "mean_words"),
    prompts=1,
    rows=(
        published("LLaVA-1.5-7B", V1, score=2.36, hallucination_rate=0.510),
        published("LLaVA-RLHF 13B", V1, score=2.02, hallucination_rate=0.625),
        published("RLAIF-V 7B", V1, score=3.06, hallucination_rate=0.292),
        published("RLAIF-V 12B", V1, score=3.36, hallucination_rate=0.292),
    ),
    protocol={
        "judge": "gpt-4-1106-preview",
        "prompt": "published",
        "unreadable_replies": "count as 0 (published rule)",
        "n": 96,
    },
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: read, ask, score, print."""
    parser = command("mmhal", "MMHal-Bench: a judge rates answers from 0 to 6 for information and hallucination")
    parser.add_argument("--template", help="the benchmark's template, where --answers is not the template filled in")
    parser.add_argument("--strict-published", action="store_true", help="score unreadable replies as 0, as published")
    add_judge_options(parser)
    options = parser.parse_args(arguments)

    def scorer(path):
        rows, missing = read_rows(path, options.template)
        cache, prompt = cache_of(options, path), options.published_prompt
        judge = judge_of(options)
        return judge_and_score(rows, judge, cache, options.attempts, options.strict_published, prompt), missing

    run(options, scorer, SPEC)


if __name__ == "__main__":
    main()
