"""The embedded profiles are the default but for what their names say, so that a change of the default reaches them."""

import dataclasses

import pytest

from rlaifv import ROOT
from rlaifv.params import IterationParams, load_params


def profile(name: str):
    return load_params(f"params/{name}.yaml")


def test_every_profile_is_complete_and_valid():
    for path in sorted((ROOT / "params").glob("*.yaml")):
        load_params(path)


def test_self_alignment_changes_the_labeler_to_the_unaligned_policy_alone():
    default = load_params()
    own = dataclasses.replace(default.labeler, path=default.policy.path)
    assert profile("self") == dataclasses.replace(default, labeler=own)


def test_four_iterations_add_two_rounds_and_change_nothing_of_the_first_two():
    rounds = {str(k): IterationParams(str(k - 1)) for k in range(1, 5)}
    assert profile("four-iterations") == dataclasses.replace(load_params(), iterations=rounds)


def test_the_control_has_one_round_with_the_instructions_of_all_four():
    four = profile("four-iterations")
    prepare = dataclasses.replace(four.prepare, per_iteration=4 * four.prepare.per_iteration)
    one = {"1": IterationParams("0")}
    assert profile("one-large-round") == dataclasses.replace(four, prepare=prepare, iterations=one)
    assert prepare.per_iteration <= four.world.train


@pytest.mark.parametrize("key", ["temperature_spread", "whole_answer", "coin_share"])
def test_no_profile_runs_an_ablation_unasked(key):
    for name in ("self", "four-iterations", "one-large-round", "llava15-7b"):
        params = profile(name)
        assert not any(getattr(s, key, 0) for s in (params.generate, params.divide, params.feedback))
