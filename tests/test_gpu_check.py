"""The check of a GPU: what it calls wrong, and its measurements on a CPU in their smallest form."""

import json
import subprocess
import sys

import pytest

from rlaifv import ROOT
from speed.gpu_check import checks, problems


@pytest.mark.parametrize(
    "found", [{"max_abs_logprob_diff": 1e-3}, {"loss_rel_diff": 1e-3}, {"loss_rel_diff": float("nan")}]
)
def test_in_float32_a_difference_is_a_problem(found):
    (line,) = problems("x.py", found, "float32")
    assert line.startswith(f"x.py: {next(iter(found))} is ")


def test_in_bfloat16_shared_prefixes_may_be_as_noisy_as_plain_batches():
    assert problems("x.py", {"max_abs_logprob_diff": 0.131, "noise_floor": 0.133}, "bfloat16") == []
    assert len(problems("x.py", {"max_abs_logprob_diff": 0.5, "noise_floor": 0.133}, "bfloat16")) == 1


def test_samples_are_equal_in_float32_and_may_part_ways_in_bfloat16():
    found = {"share_of_equal_samples": 0.9}
    assert problems("x.py", found, "float32") == ["x.py: only 90% of the samples are equal"]
    assert problems("x.py", found, "bfloat16") == []


def test_every_measurement_is_kept_on_a_gpu_only():
    assert all("--keep" in arguments for _, arguments in checks("cuda", "7b"))
    assert not any("--keep" in arguments for _, arguments in checks("cpu", "nano"))


def test_feedback_is_measured_on_a_cpu_too_and_nothing_is_wrong():
    command = [sys.executable, "speed/feedback.py", "--size", "nano", "--questions", "6", "--repeats", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert problems("feedback.py", found, "float32") == []
    assert found["questions"] == 6 and found["noise_floor"] < 1e-4
