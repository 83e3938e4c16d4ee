"""Best-of-N curves: known pools give known rates, and better rewards give better choices."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaifv.evaluation.best_of_n import (
    METHODS,
    chances,
    choice_gains,
    curve,
    expected_rates,
    make_pool,
    resample,
    sizes,
)
from rlaifv.evaluation.hallucination import Split
from rlaifv.records import Candidate, Instruction
from rlaifv.steps.self_feedback import CandidateLogps, CandidateScore


def pool_of(candidates: int = 8, instructions: int = 60, noise: float = 0.0, seed: int = 0):
    """Every instruction's image shows a dog and a cup; candidates name the dog, maybe the cup, maybe a phantom cat.

    The log-ratio is −10 a phantom per token, and `noise`; longer answers have more of everything.
    """
    rng = np.random.default_rng(seed)
    rows = [Instruction(str(i), f"{i}.png", "Describe the image.") for i in range(instructions)]
    split = Split(
        "test", rows, {str(i): {"dog", "cup"} for i in range(instructions)},
        {f"{i}.png": str(i) for i in range(instructions)}, [], None,
    )  # fmt: skip
    answers, logps = [], []
    for i in range(instructions):
        for s in range(candidates):
            phantom, cup = rng.random() < 0.5, rng.random() < 0.7
            text = "There is a dog." + " There is a cup." * cup + " There is a cat." * phantom
            tokens = len(text.split())
            answers.append(Candidate(f"{i}#{s}", str(i), s, text, tokens, "stop", 0, "m"))
            ratio = tokens * (-10.0 * phantom + noise * rng.normal())
            logps.append(CandidateLogps(f"{i}#{s}", ratio, 0.0, tokens, "p", "r"))
    return answers, logps, split


def row(rows, method: str, n: int):
    return next(r for r in rows if r["method"] == method and r["n"] == n)


def test_counts_of_a_pool_are_those_of_chair():
    pool, left_out = make_pool(*pool_of(), 8)
    assert left_out == 0 and pool.mentions.shape == (60, 8)
    assert set(pool.truth) == {2}
    assert ((pool.covered + pool.hallucinated) == pool.mentions).all()


def test_a_perfect_reward_is_as_good_as_the_oracle_and_random_choice_stays_where_it_was():
    pool, _ = make_pool(*pool_of(), 8)
    rows = curve(pool, resample(pool, 200))
    assert [row(rows, "random", n)["response_hallucination"] for n in sizes(8)] == [
        row(rows, "random", 1)["response_hallucination"]
    ] * 4
    assert row(rows, "normalized", 1)["response_hallucination"] == row(rows, "random", 1)["response_hallucination"]
    assert row(rows, "normalized", 8)["response_hallucination"] == row(rows, "oracle", 8)["response_hallucination"]
    assert row(rows, "oracle", 8)["recall"] > row(rows, "normalized", 8)["recall"]


def test_a_reward_model_chooses_beside_the_others_where_candidates_have_its_score():
    answers, logps, split = pool_of(noise=50.0)
    scores = [CandidateScore(c.id, -100.0 * ("cat" in c.answer) + ("cup" in c.answer), "rm") for c in answers]
    pool, _ = make_pool(answers, logps, split, 8, scores)
    rows = curve(pool, resample(pool, 20))
    best = row(rows, "reward_model", 8)
    assert best["response_hallucination"] == row(rows, "oracle", 8)["response_hallucination"] < 0.02
    assert best["recall"] == row(rows, "oracle", 8)["recall"]
    assert "reward_model" not in make_pool(answers, logps, split, 8)[0].methods
    assert make_pool(answers, logps, split, 8, scores[:-1])[1] == 1, "all of an instruction's candidates or none"


def test_a_reward_that_falls_with_length_is_mended_by_normalization():
    answers, logps, split = pool_of()
    # every token costs 5 on top of the phantom's price: the sum prefers to say less, the mean does not
    logps = [dataclasses.replace(v, policy_logp=v.policy_logp - 5.0 * v.tokens) for v in logps]
    pool, _ = make_pool(answers, logps, split, 8)
    found = choice_gains(pool, resample(pool, 200), 8)
    assert found["recall_against_summed"] > 0.1
    assert found["recall_against_summed_interval"][0] > 0
    assert found["relative_reduction"] > 0.9


def test_noise_makes_intervals_that_hold_the_value_and_are_the_same_every_time():
    pool, _ = make_pool(*pool_of(noise=10.0), 8)
    rows = curve(pool, resample(pool, 200))
    for r in rows:
        for rate in ("response_hallucination", "recall"):
            low, high = r[f"{rate}_interval"]
            assert low <= r[rate] <= high
    assert rows == curve(pool, resample(pool, 200))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=7), st.data())
def test_chances_are_those_of_all_draws_counted_one_by_one(values, data):
    n = data.draw(st.integers(1, len(values)))
    counted, draws = np.zeros(len(values)), list(itertools.combinations(range(len(values)), n))
    for drawn in draws:
        best = [i for i in drawn if values[i] == max(values[j] for j in drawn)]
        counted[best] += 1 / len(best) / len(draws)
    assert chances(np.array([values]), n)[0] == pytest.approx(counted)


def test_more_candidates_cannot_be_drawn_than_there_are():
    with pytest.raises(ValueError, match="cannot draw 3 of 2 candidates"):
        chances(np.zeros((1, 2)), 3)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    pool, _ = make_pool(*pool_of(candidates=8, instructions=400), 8)
    low, high = row(curve(pool, resample(pool, 4000)), "random", 1)["recall_interval"]
    per_image = pool.covered.mean(1) / 2
    assert high - low == pytest.approx(2 * 1.96 * per_image.std() / 20, rel=0.06)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 9), st.floats(0, 30))
def test_no_method_hallucinates_less_than_the_oracle(seed, candidates, noise):
    pool, _ = make_pool(*pool_of(candidates, 10, noise, seed), candidates)
    for n in sizes(candidates):
        rates = {m: expected_rates(pool, m, n, resample(pool, 20))["response_hallucination"] for m in METHODS}
        for method in METHODS:
            assert (rates[method] >= rates["oracle"] - 1e-12).all()


def test_instructions_with_too_few_candidates_are_left_out_and_counted():
    answers, logps, split = pool_of()
    pool, left_out = make_pool(answers, logps[1:], split, 8)
    assert (len(pool.truth), left_out) == (59, 1)
    with pytest.raises(ValueError, match="no instruction has 9"):
        make_pool(answers, logps, split, 9)


def test_where_nothing_hallucinates_there_is_no_reduction_to_speak_of():
    pool, _ = make_pool(*pool_of(), 8)
    faithful = dataclasses.replace(pool, hallucinated=np.zeros_like(pool.hallucinated))
    found = choice_gains(faithful, resample(pool, 200), 8)
    assert (found["relative_reduction"], found["relative_reduction_interval"]) == (0.0, (0.0, 0.0))
    once = pool.hallucinated * 0
    once[0, 0] = 1  # in most resamples no random answer hallucinates
    found = choice_gains(dataclasses.replace(pool, hallucinated=once), resample(pool, 50), 8)
    assert np.abs(found["relative_reduction_interval"]).max() <= 20
