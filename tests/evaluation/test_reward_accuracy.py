"""How good a reward model is, counted by hand."""

import math

import pytest

from rlaifv.evaluation.reward_accuracy import (
    ScoredAnswers,
    ScoredPair,
    accuracy,
    best_of_n,
    calibration,
    length_correlation,
)


def pair(image: str, gap: float, kind: str = "a") -> ScoredPair:
    return ScoredPair(f"{image}{gap}", image, kind, gap, 0.0)


def test_accuracy_is_the_share_of_higher_rewards_overall_and_by_kind_and_a_tie_is_wrong():
    found = accuracy([pair("1", 2.0), pair("1", -1.0), pair("2", 0.0, "b"), pair("3", 1.0, "b")])
    assert found["value"] == 0.5 and found["n"] == 4
    assert {kind: part["value"] for kind, part in found["by_kind"].items()} == {"a": 0.5, "b": 0.5}
    low, high = found["interval"]
    assert 0 <= low < 0.5 < high <= 1
    with pytest.raises(ValueError, match=r"raise reward_model\.held_out"):
        accuracy([])


def test_intervals_resample_images_not_pairs():
    apart = accuracy([pair(str(i), 1.0 if i % 2 else -1.0) for i in range(40)])["interval"]
    together = accuracy([pair(str(i // 10), 1.0 if i // 10 % 2 else -1.0) for i in range(40)])["interval"]
    assert together[1] - together[0] > 1.5 * (apart[1] - apart[0])


def test_calibration_compares_confidence_with_how_often_it_is_right():
    sure = math.log(9)  # σ = 0.9
    rows = calibration([pair("1", sure)] * 6 + [pair("2", -sure)] * 4 + [pair("3", 0.01)])
    assert [row["n"] for row in rows["bins"]] == [1, 10]
    assert rows["bins"][1]["confidence"] == pytest.approx(0.9) and rows["bins"][1]["right"] == 0.6
    assert rows["error"] == pytest.approx((10 * 0.3 + (1 - 0.5025)) / 11, abs=1e-3)


def test_a_taste_for_length_is_a_correlation_among_the_answers_to_one_question():
    longer = [ScoredAnswers("1", [1, 2, 3], [10, 20, 30]), ScoredAnswers("2", [7, 8, 9], [11, 21, 31])]
    assert length_correlation(longer)["value"] == pytest.approx(1)
    shorter = [ScoredAnswers("1", [3, 2, 1], [10, 20, 30])]
    assert length_correlation(shorter)["value"] == pytest.approx(-1)
    between = [ScoredAnswers("1", [1, 1], [10, 10]), ScoredAnswers("2", [9, 9], [90, 90])]
    assert length_correlation(between)["value"] == 0, "questions that ask for more are no taste"


def test_best_of_n_takes_the_highest_reward_against_an_average_answer():
    answers = [
        ScoredAnswers("1", [0.0, 5.0], [10, 30], [0, 2]),
        ScoredAnswers("2", [4.0, 1.0], [20, 40], [0, 1]),
    ]
    found = {name: part["value"] for name, part in best_of_n(answers).items()}
    assert found == {"tokens": 25, "tokens_of_all": 25, "error": 0.5, "error_of_all": 0.5}
    assert "error" not in best_of_n([ScoredAnswers("1", [0.0], [10])])
