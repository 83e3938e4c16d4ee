"""The rewards of reinforcement learning, each by hand."""

import dataclasses

import pytest
import torch

from rlaifv.training.rewards import (
    REWARDS,
    Judged,
    claims,
    content,
    correct,
    length,
    neutral,
    recall,
    reward_model,
    stated,
    stop,
)

ANSWER = Judged(
    text="There is a red cup. There is a dog.",
    tokens=12,
    finished=True,
    usual=10.0,
    claims=("There is a cup in the image.", "The cup is red.", "There is a dog in the image."),
    accepted=(True, True, False),
    facts=("There is a cup in the image.", "The cup is blue."),
    score=0.7,
)


def changed(**values) -> Judged:
    return dataclasses.replace(ANSWER, **values)


def test_claims_costs_one_for_every_rejected_claim():
    assert claims(ANSWER) == -1.0 and claims(changed(accepted=(True, True, True))) == 0.0
    assert claims(changed(accepted=(False, False, False))) == -3.0


def test_an_answer_that_says_nothing_that_can_be_checked_is_not_the_best_there_is():
    assert claims(changed(claims=(), accepted=())) is None and recall(changed(claims=(), accepted=())) == 0.0


def test_recall_is_the_share_of_the_facts_that_are_stated():
    assert recall(ANSWER) == 0.5  # the cup, but it is red and not blue
    assert recall(changed(facts=ANSWER.facts[:1])) == 1.0
    assert recall(changed(facts=None)) is None and recall(changed(claims=None)) is None


@pytest.mark.parametrize(
    ("fact", "said", "expected"),
    [
        ("There is a chair in the image.", "There are two chairs in the image.", True),
        ("There are two chairs in the image.", "There is a chair in the image.", False),
        ("A man rides a wave.", "The man in a wetsuit rides a large wave.", True),
        ("The mouse is at the top.", "The mouse is at the top-left.", False),
        ("The cup is red.", "The dog is red.", False),
    ],
)
def test_a_fact_is_stated_where_one_claim_has_all_its_words(fact, said, expected):
    assert stated(fact, [said, "It is a lovely day."]) is expected


def test_words_of_two_claims_do_not_add_up_to_a_fact():
    assert not stated("The cup is red.", ["There is a cup.", "The dog is red."])
    assert content("The picture shows two knives.") == {"show", "two", "knife"}


def test_length_costs_the_share_by_which_an_answer_is_longer_or_shorter_than_usual():
    assert length(ANSWER) == pytest.approx(-0.2) and length(changed(tokens=8)) == pytest.approx(-0.2)
    assert length(changed(tokens=10)) == 0.0


def test_an_answer_that_was_cut_gets_stop():
    assert (stop(ANSWER), stop(changed(finished=False))) == (0.0, -1.0)


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("no", "No, there is none.", 0.5),
        ("No.", "Yes, a red one.", -0.5),
        ("no", "There is none.", 0.0),
        ("yes", "No.", 0.0),  # models say yes anyway: no reward for it, nor a cost
        ("yes", "Yes.", 0.0),
        ("skateboard", "The correct option is skateboard.", 1.0),
        ("skate", "The correct option is skateboard.", 0.0),
        ("", "Yes.", None),
    ],
)
def test_correct_pays_what_fact_rlhf_pays(gold, text, reward):
    assert correct(changed(gold=gold, text=text)) == reward


def test_the_reward_models_score_is_a_reward_and_none_where_there_is_no_such_model():
    assert reward_model(ANSWER) == 0.7 and reward_model(changed(score=None)) is None
    assert list(REWARDS) == ["claims", "recall", "length", "stop", "correct", "reward_model"]


def test_a_reward_that_does_not_apply_leaves_the_others_baseline_right_and_gives_no_advantage():
    values = [-1.0, None, 0.0, -2.0, 0.5, 0.5, None, None, None, None, None, None]
    filled = neutral(values, group=4)
    assert filled == [-1.0, -1.0, 0.0, -2.0, 0.5, 0.5, 0.5, 0.5, None, None, None, None]
    of_four = torch.tensor(filled[:4])
    advantages = of_four - (of_four.sum() - of_four) / 3  # what each is compared with: the mean of the three others
    known = torch.tensor([-1.0, 0.0, -2.0])
    among_themselves = known - (known.sum() - known) / 2
    assert advantages[1] == 0
    assert torch.allclose(advantages[[0, 2, 3]], among_themselves * 4 * (3 - 1) / (3 * (4 - 1)))


def test_nothing_is_changed_where_every_answer_is_known():
    assert neutral([1.0, 2.0, 3.0, 4.0], group=2) == [1.0, 2.0, 3.0, 4.0]
