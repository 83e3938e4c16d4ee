"""A stage run by hand is told at once when it cannot be what its round needs."""

import pytest

from rlaifv.stage import Stage
from rlaifv.vlm.loading import load_model


def test_a_round_that_starts_from_another_than_the_profile_says_is_refused():
    with pytest.raises(ValueError, match=r"iteration 2 of params\.yaml starts from prev=1, not '0'"):
        Stage("generate", "params.yaml", 2, 0)
    assert Stage("generate", "params.yaml", "2", "1").prev_paths.iteration == "1"


def test_a_policy_that_the_round_before_has_not_selected_yet_is_named_with_the_way_out():
    stage = Stage("generate", "params.yaml", "2", "1")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint data/iterations/absent/policy yet: .*dvc repro"):
        load_model(stage.params.policy, stage.paths.folder.with_name("absent") / "policy")
