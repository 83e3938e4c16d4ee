"""MMHal-Bench: ratings are read strictly, unreadable ones are listed, and the table goes by question type."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.benchmarks import mmhal
from rlaifv.benchmarks.judge import Judge
from rlaifv.inference.server import NoReply


def rows(*types):
    return [mmhal.Row(f"image {i}", kind, "Cat", "What?", "A cat.", "A small cat.") for i, kind in enumerate(types)]


def test_score_hallucination_rate_and_informativeness_follow_their_formulas():
    ratings = {"image 0": 6, "image 1": 3, "image 2": 2, "image 3": 0}
    metrics = mmhal.score(rows("attribute", "attribute", "counting", "other"), ratings).metrics
    assert metrics["score"] == 11 / 4
    assert metrics["hallucination_rate"] == 1 / 2
    assert metrics["informativeness"] == (3 + 0 + 2 + 0) / 4 / 3
    assert metrics["score_attribute"] == 4.5  # by question type, whatever the order of the rows
    assert metrics["mean_words"] == 3


@pytest.mark.parametrize(
    ("reply", "rating", "published"),
    [
        ("Good.\nRating: 5", 5, 5),
        ("**Rating:** 4, somewhat informative", 4, 0),
        ("Rating: 3/6", 3, 3),
        ('{"rating": 2}', 2, 0),
        ("Rating: 2 ... no, rating: 4", None, 0),
        ("I cannot rate this.", None, 0),
        ("Rating: 7", None, 0),
        ("Rating: 4.5", None, 4),
        ("rating: 10", None, 1),
        ("", None, 0),
    ],
)
def test_a_rating_is_read_or_refused(reply, rating, published):
    assert mmhal.parse_rating(reply) == rating
    assert mmhal.parse_rating_published(reply) == published


@given(st.integers(0, 6), st.text(alphabet="abc .\n", max_size=30))
def test_a_rating_in_the_last_line_is_always_found(rating, talk):
    assert mmhal.parse_rating(f"{talk}\nRating: {rating}") == rating


def test_an_unreadable_reply_is_listed_by_default_and_zero_under_the_published_rule():
    judge = Judge("moody", lambda rs: ["Rating: 6" if r.id == "image 0" else "Hm." for r in rs])
    table = rows("attribute", "other")
    lenient = mmhal.judge_and_score(table, judge)
    assert (lenient.metrics["n"], lenient.metrics["score"], lenient.metrics["n_unparsed"]) == (1, 6, 1)
    assert [row["id"] for row in lenient.missing] == ["image 1"]
    strict = mmhal.judge_and_score(table, judge, strict_published=True)
    assert (strict.metrics["n"], strict.metrics["score"], strict.metrics["n_unparsed"]) == (2, 3, 0)
    assert strict.settings["unreadable_replies"] != lenient.settings["unreadable_replies"]


def test_a_reply_that_did_not_come_is_never_scored_not_even_under_the_published_rule():
    judge = Judge("gone", lambda rs: [NoReply("HTTP 500") for _ in rs])
    result = mmhal.judge_and_score(rows("attribute"), judge, strict_published=True)
    assert result.metrics["n"] == 0
    assert result.metrics["n_without_verdict"] == 1


def test_the_judge_reads_contents_question_reference_and_answer_and_its_reply_is_kept():
    prompts = []
    judge = Judge("reader", lambda rs: [prompts.append(r.text) or "Fine. Rating: 4" for r in rs])
    result = mmhal.judge_and_score([mmhal.Row("i", "other", "Dog, Sofa", "Who?", "A dog.", "A wolf.")], judge)
    assert all(part in prompts[0] for part in ("Dog, Sofa", "Who?", "A dog.", "A wolf."))
    assert result.rows[0]["reply"] == "Fine. Rating: 4"
    assert result.settings["judge"] == "reader" and result.settings["prompt"].startswith("ours ")


def test_an_empty_answer_is_rated_like_any_other():
    prompts = []
    judge = Judge("reader", lambda rs: [prompts.append(r.text) or "Says nothing. Rating: 3" for r in rs])
    result = mmhal.judge_and_score([mmhal.Row("i", "other", "Dog", "Who?", "A dog.", "")], judge)
    assert "### Answer of the assistant\n\n" in prompts[0]
    assert (result.metrics["n"], result.metrics["score"], result.metrics["mean_words"]) == (1, 3, 0)


def test_a_published_prompt_with_four_blanks_is_filled_in_order(tmp_path):
    path = tmp_path / "eval_gpt_mmhal.py"
    path.write_text("template = 'C {} Q {} R {} A {}'\n")
    prompts = []
    judge = Judge("reader", lambda rs: [prompts.append(r.text) or "Rating: 4" for r in rs])
    result = mmhal.judge_and_score([mmhal.Row("i", "other", "c", "q", "r", "a")], judge, prompt_file=path)
    assert prompts == ["C c Q q R r A a"]
    assert result.settings["prompt"].startswith("published ")


def test_the_real_template_is_read_filled_in_or_joined_with_an_answer_file(fetched, tmp_path):
    template = fetched("mmhal/mmhal-bench_answer_template.json")
    records = json.loads(template.read_text())
    filled, answers = tmp_path / "filled.json", tmp_path / "answers.jsonl"
    filled.write_text(json.dumps([{**record, "model_answer": "A cat."} for record in records[:95]] + records[95:]))
    lines = [{"question_id": i, "prompt": r["question"], "text": f"No {i}."} for i, r in enumerate(records)]
    lines[5]["prompt"] = "Another question?"
    answers.write_text("\n".join(map(json.dumps, lines)))
    table, missing = mmhal.read_rows(filled)
    assert ([row.answer for row in table], missing) == (["A cat."] * 95 + [""], [])  # an empty answer is an answer
    with pytest.raises(ValueError, match=r"answer_template\.json: no model_answer is filled in"):
        mmhal.read_rows(template)
    table, missing = mmhal.read_rows(answers, template)
    assert [row.answer for row in table] == [f"No {i}." for i in range(96) if i != 5]
    assert [row["id"] for row in missing] == [records[5]["image_id"]]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text('[{"question": "Who?", "answer": "A dog."}]')
    with pytest.raises(ValueError, match="not MMHal's"):
        mmhal.read_rows(path)


def test_answers_are_joined_by_image_and_second_ones_are_listed(tmp_path):
    template, answers = tmp_path / "template.json", tmp_path / "answers.jsonl"
    row = {"image_id": "a1b2", "image_content": ["Dog"], "question": "Who?", "gt_answer": "A dog."}
    template.write_text(json.dumps([{**row, "question_type": "other", "model_answer": ""}]))
    for named in ({"image_id": "a1b2"}, {"image": "images/a1b2.jpg", "question": "who?"}):
        lines = [{**named, "answer": text} for text in ("first", "second")]
        answers.write_text("\n".join(map(json.dumps, lines)))
        rows, missing = mmhal.read_rows(answers, template)
        assert [row.answer for row in rows] == ["first"]
        assert [row["reason"] for row in missing] == ["a second answer to this question"]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_the_rates_are_those_of_a_plain_count(ratings):
    rows = [mmhal.Row(str(i), "other", "", "?", "", "A dog.") for i in range(len(ratings))]
    metrics = mmhal.score(rows, {str(i): rating for i, rating in enumerate(ratings)}).metrics
    n = len(ratings)
    assert metrics["score"] == metrics["score_other"] == pytest.approx(sum(ratings) / n)
    assert metrics["hallucination_rate"] == pytest.approx(len([r for r in ratings if r in (0, 1, 2)]) / n)
    informative = [{0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2, 6: 3}[rating] for rating in ratings]
    assert metrics["informativeness"] == pytest.approx(sum(informative) / n / 3)
