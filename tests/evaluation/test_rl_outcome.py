"""DPO and reinforcement learning are measured alike: tokens, judged and false answers, samples and their KL."""

import dataclasses

import pytest
from rloo_runs import PARAMS, TASKS, save_inputs

from rlaifv.evaluation.hallucination import Split
from rlaifv.evaluation.rl_outcome import (
    dpo_tokens,
    false_answers,
    judged_hallucination,
    rloo_tokens,
    sample_answers,
)
from rlaifv.records import Instruction
from rlaifv.vlm.loading import load_vlm


def test_tokens_count_every_pass_of_the_policy():
    # 2 prompts of 10 tokens with 3 answers of 5 each; 4 pairs of 12 answer tokens: one pass, and three an epoch
    assert dpo_tokens(10, 2, 5, 3, pairs=4, pair=12, epochs=2) == 2 * (10 + 15) + 7 * 4 * (10 + 12)
    # a step: 2 prompts, 8 answers of 5 tokens, each answer five times behind its own prompt
    assert rloo_tokens(10, 3, PARAMS, 5) == 3 * (2 * (10 + 4 * 5) + 5 * 8 * (10 + 5))


def test_an_answer_hallucinates_as_judged_where_one_claim_is_not_accepted_and_one_without_claims_is_not_counted():
    yes, tie = {"p_yes": 0.9, "p_no": 0.1}, {"p_yes": 0.5, "p_no": 0.5}
    rows = [{"image": str(i), "claims": claims} for i, claims in enumerate([[yes, yes], [yes, tie], [], [yes]])]
    found = judged_hallucination(rows)
    assert found["judged"] == pytest.approx(1 / 3) and found["judged_n"] == 3
    low, high = found["judged_interval"]
    assert 0 <= low < 1 / 3 < high <= 1
    assert judged_hallucination([]) == {"judged": 0.0, "judged_interval": (0.0, 0.0), "judged_n": 0}


def test_false_answers_are_those_with_a_false_claim_of_any_kind():
    rows = [{"image": str(i), "answer": text} for i, text in enumerate(["dog dog", "cup", "dog"])]
    assert false_answers(rows, lambda image, answer: answer.count("dog"))["false"] == pytest.approx(2 / 3)


def test_a_models_own_samples_have_no_kl_to_itself_and_some_to_another(tmp_path):
    folder = save_inputs(tmp_path)
    model = load_vlm(str(folder / "model"), device="cpu")
    instructions = [Instruction(task.id, task.image_path, task.question) for task in TASKS]
    split = Split("test", instructions, {}, {}, [], folder / "images")
    params = dataclasses.replace(PARAMS, temperature=0.5)  # a random model then says no special token
    rows = sample_answers(model, model, split, params, seed=3)
    assert [row["id"] for row in rows] == ["task-0", "task-1"], "the first `compared` of them"
    assert [row["nats"] for row in rows] == [0.0, 0.0]
    other = load_vlm(str(folder / "model"), device="cpu")
    other.model.lm_head.weight.data *= 0.5
    assert all(row["nats"] != 0 for row in sample_answers(model, other, split, params, seed=3) if row["answer"])
