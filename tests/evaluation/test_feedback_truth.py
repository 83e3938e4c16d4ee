"""Feedback against the embedded world's truth: right judgements and pairs are counted as right, a coin as a coin."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.evaluation.feedback_truth import (
    claim_accuracy,
    false_claims,
    interval,
    pair_agreement,
    score_iteration,
    truth_of,
)
from rlaifv.records import Candidate, Claim, Instruction, Judgement, write_jsonl
from rlaifv.steps.pairs import Pair, write_pairs
from rlaifv.tinyworld.coco import write_world
from rlaifv.tinyworld.language import claims, imagined_caption, is_true
from rlaifv.tinyworld.scenes import Group, Scene, make_scene

SCENES = {i: make_scene(7, i) for i in range(1, 60)}


def said(image: int, phantoms: float) -> str:
    rng = random.Random(image)
    return imagined_caption(SCENES[image], rng, phantoms)


def judged_by(labeler) -> list[tuple[Claim, Judgement]]:
    """Every claim of a hallucinating caption of each scene, accepted iff `labeler(claim, scene)`."""
    rows = []
    for i, scene in SCENES.items():
        for k, text in enumerate(claims(said(i, phantoms=1.0))):
            accepted = labeler(text, scene)
            judgement = Judgement(f"{i}/{k}", float(accepted), float(not accepted), accepted, "l")
            rows.append((Claim(f"{i}/{k}", str(i), text, "?"), judgement))
    return rows


def accuracy(labeler) -> dict:
    return claim_accuracy(judged_by(labeler), lambda candidate: SCENES[int(candidate)])


def test_a_labeler_that_knows_the_truth_is_always_right():
    found = accuracy(is_true)
    assert (found["accuracy"], found["false_accepted"], found["true_rejected"]) == (1.0, 0.0, 0.0)
    assert set(found["per_type"]) >= {"existence", "color", "position"}


def test_a_labeler_that_accepts_everything_is_right_about_the_true_claims_only():
    found = accuracy(lambda *_: True)
    assert found["false_accepted"] == 1.0 and found["true_rejected"] == 0.0
    low, high = found["accuracy_interval"]
    assert 0.5 < low < found["accuracy"] < high < 1.0


def test_an_error_is_the_dividers_when_the_question_asks_something_else():
    scene = Scene(1, "kitchen", (Group("cup", "red", 1, 0), Group("fork", "blue", 1, 4)))
    rows = [  # claim, question, accepted
        ("The cup is red.", "Is the cup red?", True),
        ("The fork is blue.", "Is the fork red?", False),  # the divider's error
        ("The fork is at the center.", "Is the fork at the center?", False),  # the labeler's
        ("What a picture of a cup.", "Is it?", True),  # no atomic claim: nobody's
    ]
    judged = [
        (Claim(str(k), "1", claim, question), Judgement(str(k), float(accepted), float(not accepted), accepted, "l"))
        for k, (claim, question, accepted) in enumerate(rows)
    ]
    found = claim_accuracy(judged, lambda _: scene)
    assert (found["accuracy"], found["misquoted"], found["wrong_misquoted"]) == (0.5, 0.25, 0.5)


def test_a_coin_is_right_half_the_time():
    rng = random.Random(0)
    low, high = accuracy(lambda *_: rng.random() < 0.5)["accuracy_interval"]
    assert low < 0.5 < high


def test_a_whole_answer_holds_when_all_its_claims_do():
    def holds(text: str, image: int) -> bool:
        return truth_of(Claim("a", "a", text, "?"), SCENES[image])[0]

    assert holds(said(1, phantoms=0.0), 1)
    planted = next(i for i in SCENES if false_claims(said(i, phantoms=1.0), SCENES[i]))
    assert not holds(said(planted, phantoms=1.0), planted)


def test_a_pair_agrees_when_the_rejected_answer_really_says_more_that_is_false():
    image = next(i for i in SCENES if false_claims(said(i, phantoms=1.0), SCENES[i]))
    good, bad = said(image, phantoms=0.0), said(image, phantoms=1.0)
    pairs = [
        {"image_path": str(image), "chosen": chosen, "rejected": rejected}
        for chosen, rejected in ((good, bad), (good, bad), (bad, good), (good, good))
    ]
    found = pair_agreement(pairs, lambda path: SCENES[int(path)])
    assert (found["agreement"], found["against"], found["tie"], found["n"]) == (0.5, 0.25, 0.25, 4)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_an_interval_is_between_0_and_1_and_holds_the_share(right):
    low, high = interval(np.array(right), range(len(right)))
    assert 0 <= low <= high <= 1
    assert low - 1e-9 <= sum(right) / len(right) <= high + 1e-9


def test_a_finished_round_is_scored_from_its_files(tmp_path):
    write_world(tmp_path / "world", seed=7, train=4, dev=1, test=1)
    instruction = Instruction("a", "000000000001.png", "Describe the image.")
    write_jsonl(tmp_path / "prepared" / "train.jsonl", [instruction])
    texts = ["There is a red cup at the top.", "There is a blue fork at the left."]
    candidates = [Candidate(f"a#{s}", "a", s, text, 9, "stop", 0, "m") for s, text in enumerate(texts)]
    folder = tmp_path / "round"
    write_jsonl(folder / "candidates" / "candidates.jsonl", candidates)
    found = [Claim(f"{c.id}/{k}", c.id, text, "?") for c in candidates for k, text in enumerate(claims(c.answer))]
    write_jsonl(folder / "claims" / "claims.jsonl", found)
    write_jsonl(folder / "judgements" / "judgements.jsonl", [Judgement(c.id, 0.0, 1.0, False, "l") for c in found])
    write_pairs(
        folder / "pairs" / "pairs.parquet", [Pair(instruction, *candidates, 0, -1)], tmp_path / "world/images", "t"
    )
    result = score_iteration(folder, tmp_path / "prepared", tmp_path / "world" / "instances_train.json")
    expected = [not is_true(c.claim, make_scene(7, 1)) for c in found]
    assert result["claims"]["accuracy"] == pytest.approx(sum(expected) / len(expected))
    assert result["pairs"]["n"] == 1
