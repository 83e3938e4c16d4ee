"""A claim is judged or rejected with its reason; a labeler that answers with no number judges nothing."""

import dataclasses
import math
from functools import partial

import pytest
from PIL import Image
from tiny_llava import save_tiny_llava

from rlaifv.inference import yes_no
from rlaifv.params import load_params
from rlaifv.records import Claim, Judgement, read_jsonl, read_records
from rlaifv.steps import feedback as feedback_module
from rlaifv.steps.feedback import feedback
from rlaifv.store import Store, TooManyRejects
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.loading import load_vlm

QUESTIONS = ("is there a dog ?", "is the <image> red ?", "is it </s> no", "dog " * 300, "is there a cat ?")


@pytest.fixture(scope="module")
def labeler(tmp_path_factory):
    return load_vlm(str(save_tiny_llava(tmp_path_factory.mktemp("labeler"), context=256)))


@pytest.fixture
def run(labeler, tmp_path):
    """`feedback` on the questions above, two images to a chunk: `run(max_reject_rate)`."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (24, 24)).save(tmp_path / name)
    claims = [Claim(f"{name}/{k}", name, "c", question) for name in "ab" for k, question in enumerate(QUESTIONS)]
    images = {"a": "a.png", "b": "b.png"}

    def run(rate: float) -> tuple[int, int, int]:
        params = dataclasses.replace(load_params().feedback, batch_size=2, max_reject_rate=rate, suffix="")
        store = Store("feedback", {}, tmp_path / "scratch")
        return feedback(lambda: labeler, claims, images, tmp_path, params, store, tmp_path / "out" / "judgements.jsonl")

    return run


def test_a_question_that_cannot_be_put_to_the_labeler_is_rejected_and_the_others_are_judged(run, tmp_path):
    assert run(0.6)[:2] == (4, 6)
    judged = read_records(tmp_path / "out" / "judgements.jsonl", Judgement)
    assert [j.claim_id for j in judged] == ["a/0", "a/4", "b/0", "b/4"]
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "out" / "rejects.jsonl")}
    assert "holds '<image>'" in reasons["a/1"] and "holds '</s>'" in reasons["b/2"]
    assert "300 tokens, the context holds" in reasons["b/3"]


@pytest.mark.parametrize("lost", [(math.nan, 0.2), (0.9, math.nan), (math.inf, 0.2)])
def test_a_labeler_that_turns_nan_stops_the_run_which_goes_on_when_it_has_numbers_again(
    run, tmp_path, monkeypatch, lost
):
    monkeypatch.setattr(feedback_module, "judge_fit", lambda vlm, items: [[lost] * len(asked) for _, asked in items])
    with pytest.raises(TooManyRejects, match=r"P\(yes\) is .* and P\(no\) .*: try another labeler.dtype"):
        run(0.6)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(feedback_module, "judge_fit", yes_no.judge_fit)
    assert run(0.6)[:2] == (4, 6)


def test_a_few_judgements_that_are_no_numbers_are_rejects(run, tmp_path, monkeypatch):
    def sometimes(vlm, items):
        return [[(math.nan, 0.2), *[(0.9, 0.05)] * (len(asked) - 1)] for _, asked in items]

    monkeypatch.setattr(feedback_module, "judge_fit", sometimes)
    assert run(0.3)[:2] == (8, 2)
    assert all(j.accepted for j in read_records(tmp_path / "out" / "judgements.jsonl", Judgement))
    assert [row["id"] for row in read_jsonl(tmp_path / "out" / "rejects.jsonl")] == ["a/0", "b/0"]


def test_questions_that_fit_are_judged_as_without_the_others(labeler):
    image = Image.new("RGB", (24, 24))
    judge = partial(yes_no.judge_fit, labeler)
    (mixed,), (alone,) = judge([(image, QUESTIONS)]), judge([(image, [QUESTIONS[0], QUESTIONS[4]])])
    assert [mixed[0], mixed[4]] == alone
    assert [type(reason) for reason in judge([(image, QUESTIONS[1:4])])[0]] == [UnfitText] * 3
