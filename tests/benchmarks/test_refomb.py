"""RefoMB: two judgements a row, averaged over runs with their spread."""

import json

import pytest

from rlaifv.benchmarks import refomb
from rlaifv.benchmarks.judge import Judge
from rlaifv.inference.server import NoReply

ROWS = [refomb.Row(str(i), "OCR" if i else "Creative", f"Q{i}?", "A long one.", "ref", f"answer {i}") for i in range(4)]


def test_overall_win_and_trust_follow_their_formulas():
    verdicts = [{"0": "A", "1": "B", "2": "C", "3": "B"}]
    trust = [{"0": "C", "1": "C", "2": "B", "3": "A"}]
    metrics = refomb.score(ROWS, verdicts, trust).metrics
    assert metrics["overall"] == (0 + 1 + 0.5 + 1) / 4
    assert metrics["win"] == 2 / 4
    assert metrics["trust"] == (0.5 + 0.5 + 1 + 0) / 4
    assert metrics["trust_Creative"] == 0.5


def test_runs_are_averaged_and_their_spread_is_given():
    result = refomb.score(ROWS, [dict.fromkeys("0123", "B"), dict.fromkeys("0123", "A")], [{}, {}])
    assert result.metrics["overall"] == 0.5
    assert result.metrics["overall_spread"] == pytest.approx(2**-0.5)
    assert len([row for row in result.missing if "trust" in row["reason"]]) == 8


@pytest.mark.parametrize(
    ("reply", "verdict", "published"),
    [
        ("so [[B]]", "B", "B"),
        ("[[A]] at first, but [[B]]", None, "A"),
        ("[[C]] and again [[C]]", "C", "C"),
        ("A is better", None, None),
    ],
)
def test_a_verdict_is_read_or_refused(reply, verdict, published):
    assert refomb.parse_verdict(reply) == verdict
    assert refomb.parse_verdict_published(reply) == published


def test_the_second_judge_reads_the_first_ones_review_and_every_run_asks_anew(tmp_path):
    asked = []

    def ask(requests):
        asked.extend(requests)
        return ["Both fine. [[C]]" if "review text" in r.text else f"Review of {r.id}. [[B]]" for r in requests]

    cache = tmp_path / "cache.jsonl"
    result = refomb.judge_and_score(ROWS, Judge("j", ask), cache, runs=2)
    assert len(asked) == 2 * 2 * len(ROWS)
    assert "Review of 0. [[B]]" in asked[4].text
    assert (result.metrics["overall"], result.metrics["trust"], result.metrics["runs"]) == (1, 0.5, 2)
    refomb.judge_and_score(ROWS, Judge("j", ask), cache, runs=2)
    assert len(asked) == 2 * 2 * len(ROWS)


def test_rows_that_the_judge_left_are_listed_with_their_run():
    judge = Judge("j", lambda rs: [NoReply("HTTP 500") if r.id == "2" else "[[B]]" for r in rs])
    result = refomb.judge_and_score(ROWS, judge, runs=3)
    assert result.metrics["n"] == 3
    assert [row["reason"] for row in result.missing] == [f"run {n}, review: no reply: HTTP 500" for n in range(3)]


def test_the_real_rows_are_joined_by_question_and_image(fetched, tmp_path):
    reference = fetched("refomb/gpt4v_RefoMB_dev_0521.jsonl")
    records = [json.loads(line) for line in reference.read_text().splitlines()]
    lines = [{"image_url": r["image_url"], "prompt": r["question"], "text": f"No {r['id']}"} for r in records]
    lines[1]["text"] = ""
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, reversed(lines[1:]))))
    rows, missing = refomb.read_rows(reference, path)
    assert len(rows) == 98
    assert rows[0].answer == "", "an empty answer is an answer"
    assert all(row.answer == f"No {row.id}" for row in rows[1:])
    assert [row["id"] for row in missing] == [str(records[0]["id"])]


def test_a_second_answer_is_listed_and_a_file_without_reference_answers_is_refused(tmp_path):
    reference, answers = tmp_path / "reference.jsonl", tmp_path / "answers.jsonl"
    row = {"id": 5, "image_url": "https://images.example.org/a.jpg", "question": "What?", "description": "A dog."}
    reference.write_text(json.dumps({**row, "type": "fine", "answer": "A dog."}))
    lines = [{"image_url": "a.jpg", "question": "what?", "answer": text} for text in ("first", "second")]
    answers.write_text("\n".join(map(json.dumps, lines)))
    rows, missing = refomb.read_rows(reference, answers)
    assert [row.answer for row in rows] == ["first"]
    assert [row["reason"] for row in missing] == ["a second answer to this question"]
    reference.write_text(json.dumps({**row, "type": "fine", "answer": ""}))
    with pytest.raises(ValueError, match=r"row 0 of .*reference\.jsonl has no reference answer"):
        refomb.read_rows(reference, answers)
