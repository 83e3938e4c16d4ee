"""Intervals cover the truth about as often as they say; the paired test sees a difference and no ghost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaifv.evaluation.bootstrap import compare_paired, intervals, percentile_interval
from rlaifv.evaluation.scores import Scores


def scores(hits, of=None, name="rate"):
    rows = [{"id": str(i)} for i in range(len(hits))]
    return Scores("test", rows, {name: (hits, of or [1] * len(hits))}, {"n": len(hits)})


def test_an_interval_of_a_share_agrees_with_the_normal_approximation():
    low, high = intervals(scores([1] * 120 + [0] * 280))["rate"]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.006)


def test_a_percentile_interval_is_the_middle_of_the_numbers_and_zeros_without_any():
    values = np.array([*range(101), np.nan])
    assert percentile_interval(values) == (2.5, 97.5)
    assert percentile_interval(values, tail=10) == (10, 90)
    assert percentile_interval(values[101:]) == percentile_interval(values[:0]) == (0.0, 0.0)


def test_intervals_cover_the_truth_in_about_95_of_100_samples():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        of = rng.integers(1, 6, size=150)
        bounds = intervals(scores(list(rng.binomial(of, 0.2)), list(of)), resamples=400, seed=seed)["rate"]
        covered += bounds[0] <= 0.2 <= bounds[1]
    assert 180 <= covered <= 198


def test_the_same_seed_gives_the_same_numbers():
    assert intervals(scores([0, 1, 1, 0, 1]), seed=3) == intervals(scores([0, 1, 1, 0, 1]), seed=3)
    uneven = scores(list(range(80)), [80 + i % 7 for i in range(80)])
    assert intervals(uneven, seed=3) != intervals(uneven, seed=4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=20))
def test_an_interval_lies_around_its_rate_and_nothing_to_count_is_no_error(pairs):
    hits, of = [min(pair) for pair in pairs], [max(pair) for pair in pairs]
    result = scores(hits, of)
    low, high = intervals(result, resamples=200)["rate"]
    assert 0 <= low <= high <= 1
    if len(set(pairs)) == 1:
        assert low == pytest.approx(result.metrics["rate"]) == high


def test_a_paired_test_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(1)
    hard = rng.random(300) < 0.5  # rows on which both models fail
    a = scores([int(value) for value in hard])
    better = [int(value and rng.random() > 0.15) for value in hard]
    (test,) = compare_paired(a, scores(better))
    assert test.p_value < 0.01 and test.high < 0
    assert test.difference == pytest.approx(test.b - test.a)
    first, second = intervals(a)["rate"], intervals(scores(better))["rate"]
    assert first[0] < second[1]  # the two intervals overlap all the same


def test_a_model_does_not_differ_from_itself():
    model = scores([0, 1, 1, 0, 1, 0, 0, 1])
    (test,) = compare_paired(model, model)
    assert (test.difference, test.low, test.high, test.p_value) == (0, 0, 0, 1)


def test_two_equal_models_seldom_seem_different():
    rng = np.random.default_rng(2)
    found = 0
    for seed in range(100):
        pair = rng.binomial(3, 0.3, size=(2, 80))
        a, b = (scores([int(x) for x in row], [3] * 80) for row in pair)
        found += compare_paired(a, b, resamples=200, seed=seed)[0].p_value < 0.05
    assert found <= 12


def test_rows_are_paired_by_id_not_by_position():
    a = Scores("test", [{"id": "x"}, {"id": "y"}, {"id": "z"}], {"rate": ([1, 0, 0], [1, 1, 1])}, {})
    b = Scores("test", [{"id": "y"}, {"id": "x"}], {"rate": ([0, 1], [1, 1])}, {})
    (test,) = compare_paired(a, b)
    assert (test.n, test.a, test.b, test.difference) == (2, 0.5, 0.5, 0)


def test_rows_that_cannot_be_paired_are_refused_with_their_ids():
    with pytest.raises(ValueError, match="no row id in common"):
        compare_paired(scores([1]), Scores("test", [{"id": "other"}], {"rate": ([1], [1])}, {}))
    twice = Scores("test", [{"id": "x"}, {"id": "x"}], {"rate": ([1, 0], [1, 1])}, {})
    with pytest.raises(ValueError, match="two rows with the id 'x'"):
        compare_paired(twice, twice)


def test_one_lucky_mention_among_many_makes_no_difference_however_much_the_models_say():
    of_a, of_b = [3] * 300, [3 + (i % 4 == 0) for i in range(300)]
    (test,) = compare_paired(scores([1] + [0] * 299, of_a), scores([0] * 300, of_b))
    assert test.p_value > 0.5 and test.low < 0 <= test.high


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_p_is_below_a_twentieth_just_when_the_interval_leaves_zero_out(seed):
    rng = np.random.default_rng(seed)
    of = list(rng.integers(1, 5, size=60))
    a, b = (scores(list(rng.binomial(of, share)), of) for share in (0.3, 0.3 + rng.random() / 4))
    (test,) = compare_paired(a, b, resamples=800)
    if abs(test.p_value - 0.05) > 0.01:
        assert (test.p_value < 0.05) == (test.low > 0 or test.high < 0)
