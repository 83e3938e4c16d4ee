"""The embedded annotators: what they say of two answers is their stated formula, flips and all."""

import pytest

from rlaifv.records import Candidate, Instruction
from rlaifv.tinyworld.annotator import annotate
from rlaifv.tinyworld.language import claims, false_of, sentence
from rlaifv.tinyworld.scenes import Group, make_scene

SCENES = {f"{k:012d}.png": make_scene(3, k) for k in range(1, 61)}
INSTRUCTIONS = [Instruction(f"i{name}", name, "What is in the picture?") for name in SCENES]
WRONG = Group("kite", "red", 1, 0)


def answers(instruction: Instruction) -> list[Candidate]:
    """The truth, at three lengths; the last one, and the longest, also names what is not there."""
    scene = SCENES[instruction.image_path]
    absent = next(name for name in ("cup", "dog", "bus") if scene.find(name) is None)
    truth = " ".join(sentence(group) for group in scene.groups)
    texts = {20: sentence(scene.groups[0]), 40: truth, 60: f"{truth} {sentence(Group(absent, 'red', 1, 0))}"}
    return [
        Candidate(f"{instruction.id}#{k}", instruction.id, k, text, tokens, "stop", 0, "m")
        for k, (tokens, text) in enumerate(texts.items())
    ]


CANDIDATES = [candidate for instruction in INSTRUCTIONS for candidate in answers(instruction)]


def labels(taste: float, flipped: float = 0.0, seed: int = 1):
    return annotate(INSTRUCTIONS, CANDIDATES, SCENES.__getitem__, taste, flipped, 1, seed)


def test_without_taste_and_flips_labels_are_the_truth():
    found = labels(0.0)
    assert len(found) == 60 and {p.kind for p in found} == {"existence"}
    for p in found:
        scene = SCENES[p.image_path]
        assert len(false_of(p.chosen, scene)) == 0 and len(false_of(p.rejected, scene)) == 3


def test_a_taste_for_length_outweighs_false_claims_where_its_formula_says_so():
    # three false claims cost 1; 20 tokens more are worth w, 40 are worth 2 w
    for taste, preferred in ((0.49, 0), (0.9, None), (1.01, 60)):
        found = labels(taste)
        wrong = sum(bool(false_of(p.chosen, SCENES[p.image_path])) for p in found)
        assert wrong == preferred if preferred is not None else 0 < wrong < 60


def test_annotators_of_all_tastes_see_the_same_pairs_and_flips_are_a_share_of_them():
    plain, taste, flipped = labels(0.0), labels(2.0), labels(0.0, flipped=0.15)
    assert [p.id for p in plain] == [p.id for p in taste] == [p.id for p in flipped]
    changed = sum(a.chosen != b.chosen for a, b in zip(plain, flipped, strict=True))
    assert 3 <= changed <= 17
    assert labels(0.0, 0.15) == flipped != labels(0.0, 0.15, seed=2)


def test_answers_that_make_equally_many_false_claims_are_not_asked_about():
    same = [c for c in CANDIDATES if c.sample < 2]
    assert annotate(INSTRUCTIONS, same, SCENES.__getitem__, 1.0, 0.0, 3, 1) == []
    assert claims("There is a kite.") == []
    with pytest.raises(KeyError):
        annotate(INSTRUCTIONS[:1], CANDIDATES, {}.__getitem__, 0.0, 0.0, 1, 1)
