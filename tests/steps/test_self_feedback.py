"""The DPO reward of an answer: against the model's own forward, with and without a second model, and stored."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_llava import picture, save_tiny_llava

from rlaifv.inference.reward import Rated, score
from rlaifv.records import Candidate, Instruction, read_records
from rlaifv.steps.self_feedback import (
    AnswerLogps,
    Asked,
    CandidateLogps,
    CandidateScore,
    answer_logps,
    best_of_n,
    token_logps,
    write_logps,
    write_scores,
)
from rlaifv.store import Store
from rlaifv.vlm.chat_format import prompt_text
from rlaifv.vlm.loading import load_vlm
from rlaifv.vlm.reward_format import RewardFormat, RewardHead, RewardModel

ANSWERS = ["a red dog", "there is a big blue kite and a small cat .", "a red dog", "yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    save_tiny_llava(folder / "policy", seed=1)
    save_tiny_llava(folder / "reference", seed=2)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return [load_vlm(str(folder / name), device="cpu") for name in ("policy", "reference")]


def image(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(picture(seed))).convert("RGB")


def direct_logps(vlm, seed: int, question: str, answer: str) -> torch.Tensor:
    """Per-token log-probs from one forward of the whole row."""
    batch = vlm.processor(images=[image(seed)], text=[prompt_text(vlm, question, answer=answer)], return_tensors="pt")
    prompt = vlm.processor(images=[image(seed)], text=[prompt_text(vlm, question)], return_tensors="pt")
    start = prompt["input_ids"].shape[1]
    with torch.no_grad():
        logits = vlm.model(**{k: v for k, v in batch.items() if k != "token_type_ids"}).logits[0, :-1]
    logps = logits.double().log_softmax(-1).gather(-1, batch["input_ids"][0, 1:, None]).squeeze(-1)
    return logps[start - 1 :]


def test_rewards_are_those_of_one_plain_forward_per_answer_and_model(models):
    policy, reference = models
    asked = [Asked(image(0), "describe it .", ANSWERS), Asked(image(1), "what is in the image ?", ANSWERS[:2])]
    for seed, (item, scored) in enumerate(zip(asked, answer_logps(policy, reference, asked), strict=True)):
        for answer, s in zip(item.answers, scored, strict=True):
            ours, theirs = (direct_logps(vlm, seed, item.question, answer) for vlm in models)
            assert s.tokens == len(ours)
            assert s.reward(0.1, normalize=False) == pytest.approx(0.1 * (ours - theirs).sum().item(), abs=1e-5)
            assert s.reward(0.1) == pytest.approx(0.1 * (ours - theirs).mean().item(), abs=1e-6)


def test_a_cut_answer_is_scored_without_the_end_token_that_it_never_said(models):
    scored = answer_logps(*models, [Asked(image(0), "describe it .", ["a red dog"] * 2, [False, True])])[0]
    ours = direct_logps(models[0], 0, "describe it .", "a red dog")
    assert (scored[0].tokens, scored[1].tokens) == (len(ours), len(ours) - 1)
    assert scored[1].policy == pytest.approx(ours[:-1].sum().item(), abs=1e-5)


def test_the_log_probs_of_an_answer_are_those_of_its_tokens_added_up(models):
    asked = [Asked(image(0), "describe it .", ANSWERS, [False, True, False, False])]
    tokens, sums = token_logps(*models, asked)[0], answer_logps(*models, asked)[0]
    assert [len(t.policy) for t in tokens] == [s.tokens for s in sums]
    assert tokens[1].policy.tolist() == pytest.approx(
        direct_logps(models[0], 0, "describe it .", ANSWERS[1])[:-1].tolist(), abs=1e-5
    )
    assert [t.reference.sum().item() for t in tokens] == [s.reference for s in sums]


@given(
    st.lists(
        st.builds(AnswerLogps, st.floats(-500, 0), st.floats(-500, 0), st.integers(1, 200)), min_size=1, max_size=20
    ),
    st.booleans(),
)
def test_best_of_n_is_an_answer_with_the_highest_reward(scored, normalize):
    best = scored[best_of_n(scored, 0.1, normalize)].reward(0.1, normalize)
    assert best == max(s.reward(0.1, normalize) for s in scored)


def test_normalization_ranks_by_reward_per_token():
    short, long = AnswerLogps(-3.0, -5.0, 4), AnswerLogps(-30.0, -36.0, 40)
    assert best_of_n([short, long], 0.1, normalize=True) == 0
    assert best_of_n([short, long], 0.1, normalize=False) == 1


def test_stored_rewards_resume_name_both_models_and_reject_unreadable_images(folder, models, tmp_path):
    instructions = [Instruction(str(i), f"{i}.png", "describe it .") for i in range(4)]  # 3.png does not exist
    candidates = [
        Candidate(f"{i}#{s}", str(i), s, answer, 3, "stop", 0, "x")
        for i in range(4)
        for s, answer in enumerate(ANSWERS)
    ]

    def run(name: str, store: Store) -> bytes:
        arguments = (candidates, instructions, folder, 1, store, tmp_path / name / "logps.jsonl")
        assert write_logps(lambda: models, *arguments, max_reject_rate=0.3) == (12, 4)
        return (tmp_path / name / "logps.jsonl").read_bytes()

    whole = Store("self_feedback", {"k": 1}, tmp_path / "a")
    expected = run("whole", whole)
    halfway = Store("self_feedback", {"k": 1}, tmp_path / "b")
    (halfway.folder / "000000.jsonl").write_bytes((whole.folder / "000000.jsonl").read_bytes())
    assert run("halfway", halfway) == expected
    rows = read_records(tmp_path / "whole" / "logps.jsonl", CandidateLogps)
    assert {(r.policy, r.reference) for r in rows} == {(models[0].fingerprint, models[1].fingerprint)}
    assert all(math.isfinite(r.policy_logp - r.reference_logp) for r in rows)


def test_a_reward_models_scores_are_stored_with_its_fingerprint_and_broken_images_rejected(folder, models, tmp_path):
    head = RewardHead(32).requires_grad_(False)
    model = RewardModel(models[0], head, RewardFormat(" right ?", "", "{}", "base", "random"))
    instructions = [Instruction(name, f"{name}.png", "what is it ?") for name in ("0", "gone")]
    candidates = [
        Candidate(f"{i.id}#{k}", i.id, k, ANSWERS[k], 3, "stop", 0, "m") for i in instructions for k in (0, 1)
    ]
    store, out = Store("scores", {}, tmp_path), tmp_path / "out" / "scores.jsonl"
    counts = write_scores(lambda: model, candidates, instructions, folder, 2, store, out, max_reject_rate=0.5)
    assert counts == (2, 2)
    found = read_records(out, CandidateScore)
    assert {row.model for row in found} == {models[0].fingerprint}
    (expected,) = score(model, [Rated(image(0), "what is it ?", ANSWERS[:2])])
    assert [row.reward for row in found] == pytest.approx(expected, abs=1e-5)
