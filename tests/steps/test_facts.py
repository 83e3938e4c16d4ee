"""Facts about images: where they come from, and that both answers of a pair meet the same in one order."""

import json
from dataclasses import replace

import pytest

from rlaifv.params import load_params
from rlaifv.records import Candidate, Claim, Judgement
from rlaifv.steps import facts
from rlaifv.steps.divide import Division
from rlaifv.steps.facts import accepted_claims, claims_of_others, fact_claims, in_order, read_facts, with_facts
from rlaifv.steps.preferences import Preference

PAIR = Preference("1", "a.jpg", ["What?"], "A cat.", "A dog.")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {
                "images": [{"id": 7, "file_name": "a.jpg"}],
                "annotations": [{"image_id": 7, "caption": "A cat. "}, {"image_id": 7, "caption": "Fur."}],
            },
            {"a.jpg": ["A cat.", "Fur."]},
        ),
        (
            {"a.jpg": ["A cat.", "Fur."], "aok_a.jpg": "It naps."},
            {"a.jpg": ["A cat.", "Fur."], "aok_a.jpg": ["It naps."]},
        ),
        (
            [
                {
                    "image_id": 7,
                    "question": "What naps?",
                    "choices": ["dog", "cat"],
                    "correct_choice_idx": 1,
                    "rationales": ["Its eyes are shut."],
                }
            ],
            {"aok_000000000007.jpg": ["What naps? cat.", "Its eyes are shut."]},
        ),
    ],
)
def test_captions_answers_and_rationales_are_facts_of_their_image(tmp_path, content, expected):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(content))
    assert read_facts(path) == expected


def test_a_file_of_something_else_is_refused_by_its_name(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text('{"annotations": [{"caption": "A cat."}], "images": []}')
    with pytest.raises(ValueError, match=r"facts\.json holds neither COCO captions.*image_id"):
        read_facts(path)


def test_what_the_labeler_accepts_of_other_answers_is_a_fact_and_an_answers_own_word_is_not():
    texts = {"c0": "A cat.", "c1": "A dog.", "c2": "A cat and a mat."}
    candidates = [Candidate(i, "i", k, text, 3, "stop", 0, "m") for k, (i, text) in enumerate(texts.items())]
    said = [("c0", "cat", True), ("c1", "dog", False), ("c2", "cat", True), ("c2", "mat", True), ("c2", "hat", False)]
    claims = [Claim(f"{c}/{what}", c, what, f"{what}?") for c, what, _ in said]
    judged = [Judgement(f"{c}/{what}", float(yes), float(not yes), yes, "l") for c, what, yes in said]
    known = accepted_claims(candidates, claims, judged, {"i": "a.jpg"})
    assert claims_of_others(known["a.jpg"], ["A dog."]) == ["cat", "mat"]
    assert claims_of_others(known["a.jpg"], ["A cat.", "A dog."]) == ["cat", "mat"]
    assert claims_of_others(known["a.jpg"], ["A cat and a mat."]) == ["cat"]


def test_facts_have_one_order_for_each_seed_and_image():
    many = [f"fact {i}" for i in range(9)]
    assert in_order(many, 5, 1, "a.jpg") == in_order(many, 5, 1, "a.jpg")
    assert len(in_order([*many, *many, " "], 20, 1, "a.jpg")) == 9
    assert in_order(many, 9, 1, "a.jpg") != in_order(many, 9, 1, "b.jpg") != in_order(many, 9, 2, "b.jpg")


def test_a_preference_without_known_facts_is_rejected_by_its_id():
    other = replace(PAIR, id="2", image_path="b.jpg")
    kept, (reject,) = with_facts([PAIR, other], lambda p: {"a.jpg": ["A cat."]}.get(p.image_path, []), 2, seed=0)
    assert kept == [replace(PAIR, facts=["A cat."])]
    assert reject.id == "2" and "b.jpg" in reject.reason


def test_facts_become_claims_through_the_divider(monkeypatch):
    divisions = {"A cat naps.": Division(["a cat", "it naps"], ["", ""]), "A cat.": Division(["a cat"], [""])}

    def divided(vlm, asked, params, seed):
        return [divisions.get(text, Division([], [], "unusable")) for _, text in asked]

    monkeypatch.setattr(facts, "divide_answers", divided)
    of = {"a.jpg": ["A cat naps.", "A cat."], "b.jpg": ["?"]}
    assert fact_claims(None, of, load_params().divide, 0) == {"a.jpg": ["a cat", "it naps"], "b.jpg": []}
