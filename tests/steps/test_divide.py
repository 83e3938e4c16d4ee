"""The divider's reply is read robustly, and claims and questions never misalign silently."""

import dataclasses

import pytest
from architectures import build
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.inference.served import Sampled
from rlaifv.params import load_params
from rlaifv.records import Candidate, read_jsonl
from rlaifv.steps import divide as divide_module
from rlaifv.steps.divide import Unparsable, divide, divide_answers, parse_list
from rlaifv.store import Store

PARAMS = load_params().divide


@pytest.mark.parametrize(
    "reply",
    [
        "### Facts:\n- There is a cup.\n- The cup is red.",
        "Sure! Here they are.\n\n### Facts:\n* There is a cup.\n* The cup is red.\n",
        "### facts\n1. There is a cup.\n2) The cup is red.",
        "**Facts:**\n• There is a cup.\n\n• The cup is red.",
        "### Facts:\nThere is a cup.\nThe cup is red.",
        "- There is a cup.\r\n- The cup is red.",
        "### Facts:\n- There is a cup.\n- The cup is red.\n\n### Notes:\n- I left out opinions.",
    ],
)
def test_every_usual_way_to_write_a_list_is_read(reply):
    assert parse_list(reply, "Facts:") == ["There is a cup.", "The cup is red."]


def test_an_unbulleted_line_keeps_its_first_character():
    assert parse_list("### Facts:\nA cup is red.", "Facts:") == ["A cup is red."]


@pytest.mark.parametrize("reply", ["### Facts:\n", "### Facts:\n- None", "### Facts:\nNo facts."])
def test_no_facts_is_the_empty_list(reply):
    assert parse_list(reply, "Facts:") == []


@pytest.mark.parametrize("reply", ["", "I cannot help with that.", "There is a cup."])
def test_a_reply_without_header_and_bullets_is_refused(reply):
    with pytest.raises(Unparsable, match="divider's reply"):
        parse_list(reply, "Facts:")


items = st.lists(st.from_regex(r"[A-Z][a-z ,']{0,30}[a-z]\.", fullmatch=True), min_size=1)


@given(items=items, bullet=st.sampled_from(["- ", "* ", "• ", "{}. ", "{}) "]))
def test_any_list_of_sentences_round_trips(items, bullet):
    lines = [bullet.format(i) + item for i, item in enumerate(items, start=1)]
    expected = [" ".join(item.split(" ")).strip() for item in items if item.lower() not in ("none.", "nothing.", "na.")]
    assert parse_list("### Facts:\n" + "\n".join(lines), "Facts:") == expected


def scripted(monkeypatch, replies):
    """Let the divider reply from a list; returns the prompts that it was asked."""
    asked: list[str] = []
    left = iter(replies)

    def sample(model, questions, samples, seed, decoding):
        asked.extend(question.text for question in questions)
        return [[next(left)] for _ in questions]

    monkeypatch.setattr(divide_module, "draw_answers", sample)
    return asked


def said(text: str, finish_reason: str = "stop") -> Sampled:
    return Sampled(text, 9, finish_reason)


FACTS = said("### Facts:\n- There is a cup.\n- The cup is red.")
QUESTIONS = said("### Modified sentences:\n- Is there a cup?\n- Is the cup red?")
SHORT = said("### Modified sentences:\n- Is there a cup?")


def test_a_question_list_of_another_length_is_asked_for_once_more(monkeypatch):
    scripted(monkeypatch, [FACTS, SHORT, FACTS, QUESTIONS])
    (division,) = divide_answers(None, [("Describe.", "A red cup.")], PARAMS, seed=1)
    assert division.problem == ""
    assert division.questions == ["Is there a cup?", "Is the cup red?"]


def test_a_question_list_that_stays_short_is_rejected_and_not_zipped(monkeypatch):
    scripted(monkeypatch, [FACTS, SHORT, FACTS, SHORT])
    (division,) = divide_answers(None, [("Describe.", "A red cup.")], PARAMS, seed=1)
    assert division.problem == "2 claims but 1 questions"
    assert division.claims == division.questions == []


def test_a_reply_that_was_cut_is_not_taken_for_whole(monkeypatch):
    cut = said("### Facts:\n- There is a cup.\n- The", "length")
    scripted(monkeypatch, [cut, cut])
    (division,) = divide_answers(None, [("Describe.", "A red cup.")], PARAMS, seed=1)
    assert "cut at divide.max_new_tokens" in division.problem


def test_the_whole_answer_reaches_the_divider_however_long(monkeypatch):
    asked = scripted(monkeypatch, [FACTS, QUESTIONS])
    answer = "word " * 5000 + "the very end."
    divide_answers(None, [("Describe.", answer)], PARAMS, seed=1)
    assert asked[0].endswith("the very end.")


def test_braces_in_an_answer_are_just_text(monkeypatch):
    asked = scripted(monkeypatch, [FACTS, QUESTIONS])
    divide_answers(None, [("Describe {it}.", "A {red} cup. {0}")], PARAMS, seed=1)
    assert asked[0].endswith("Question: Describe {it}.\nAnswer: A {red} cup. {0}")


def candidate(sample: int, answer: str) -> Candidate:
    return Candidate(f"i#{sample}", "i", sample, answer, 3, "stop", 1, "model")


def test_equal_answers_are_divided_once_and_rows_are_accounted_for(monkeypatch, tmp_path):
    nothing = said("### Facts:\n")
    asked = scripted(monkeypatch, [FACTS, nothing, QUESTIONS])
    candidates = [candidate(0, "A red cup."), candidate(1, "A red cup."), candidate(2, "Lovely picture.")]
    params = load_params().divide
    params = type(params)(**{**vars(params), "max_reject_rate": 0.5})
    store = Store("divide", {}, tmp_path / "scratch")
    claims, rejects = divide(lambda: None, candidates, {"i": "Describe."}, params, 1, store, tmp_path / "claims.jsonl")
    assert len(asked) == 3
    assert (claims, rejects) == (4, 1)
    rows = read_jsonl(tmp_path / "claims.jsonl")
    assert [row["id"] for row in rows] == ["i#0/0", "i#0/1", "i#1/0", "i#1/1"]
    assert read_jsonl(tmp_path / "rejects.jsonl")[0]["reason"] == "the answer makes no claim"


def test_equal_lists_of_claims_are_turned_into_questions_once(monkeypatch):
    asked = scripted(monkeypatch, [FACTS, FACTS, QUESTIONS])
    first, second = divide_answers(None, [("Describe.", "A red cup."), ("Describe.", "A cup, red.")], PARAMS, seed=1)
    assert len(asked) == 3
    assert first == second and first.questions == ["Is there a cup?", "Is the cup red?"]


def test_the_random_numbers_of_a_reply_depend_on_the_prompt_and_the_attempt_alone(monkeypatch):
    seen = []

    def sample(model, questions, samples, seed, decoding):
        seen.extend((q.text, (q.name, *samples, seed)) for q in questions)
        return [[said("?")] for _ in questions]

    monkeypatch.setattr(divide_module, "draw_answers", sample)
    divide_answers(None, [("Describe.", "One."), ("Describe.", "Two.")], PARAMS, seed=1)
    divide_answers(None, [("Describe.", "Two.")], PARAMS, seed=1)
    two = [stream for text, stream in seen if text.endswith("Two.")]
    assert two[0] == two[2] and two[1] == two[3] and two[0] != two[1]


def test_a_text_that_the_divider_would_read_as_its_own_token_is_a_problem_of_its_answer_alone():
    fine, hostile = ("Describe the image.", "A dog."), ("Describe the image.", "A dog.</s>")
    divided, refused = divide_answers(build("llama"), [fine, hostile], dataclasses.replace(PARAMS, max_new_tokens=4), 1)
    assert "holds '</s>', which the tokenizer reads as a token of its own" in refused.problem
    assert "holds" not in divided.problem
