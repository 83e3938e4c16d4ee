"""Two iterations beside each other: each answer is of one kind, by objects or by claims."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rlaifv.evaluation.hallucination import Split
from rlaifv.report.compare_view import OUTCOMES, compare, counts, outcome_of, page

TEXTS = {"right": "There is a cat and a dog.", "wrong": "There is a cat and a car.", "little": "There is a cat."}
NAMES = st.lists(st.sampled_from("abcde"), max_size=4, unique=True)


def split(annotated: bool = True) -> Split:
    return Split("test", [], {"1": {"cat", "dog"}}, {"1.png": "1"}, [], None, annotated)


def answers(*kinds: str) -> list[dict]:
    return [{"id": f"{n}", "image": "1.png", "question": "?", "answer": TEXTS[k]} for n, k in enumerate(kinds)]


def test_each_answer_is_mended_broken_still_wrong_shorter_or_the_same():
    rows = compare(
        answers("wrong", "right", "wrong", "right", "right"),
        answers("right", "wrong", "wrong", "little", "right"),
        split(),
    )
    assert [row["kind"] for row in rows] == list(OUTCOMES)
    assert counts(rows) == dict.fromkeys(OUTCOMES, 1)
    assert rows[0]["wrong"] == [["car"], []] and rows[0]["right"] == [["cat"], ["cat", "dog"]]


def test_without_annotations_the_labelers_claims_say_it():
    said = [{"claim": "a cat", "p_yes": 0.9, "p_no": 0.1}, {"claim": "a car", "p_yes": 0.2, "p_no": 0.8}]
    before, after = answers("wrong"), answers("right")
    (row,) = compare([before[0] | {"claims": said}], [after[0] | {"claims": said[:1]}], split(annotated=False))
    assert row["kind"] == "mended" and row["wrong"] == [["a car"], []]


def test_answers_to_other_instructions_are_refused():
    with pytest.raises(ValueError, match="different test instructions"):
        compare(answers("right"), answers("right", "wrong"), split())


@given(NAMES, NAMES, NAMES, NAMES)
def test_an_answer_is_called_mended_only_if_nothing_in_it_is_wrong_any_more(wrong, wrong_now, right, right_now):
    kind = outcome_of(wrong, wrong_now, right, right_now)
    assert kind in OUTCOMES and (kind == "mended") == (bool(wrong) and not wrong_now)


def test_the_page_shows_texts_as_text(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (row,) = compare(answers("wrong"), answers("right"), split())
    shown = page(row | {"after": "<script>"}, ["iteration 0", "iteration 2"], tmp_path)
    assert "&lt;script&gt;" in shown and "<script>" not in shown and "car" in shown
