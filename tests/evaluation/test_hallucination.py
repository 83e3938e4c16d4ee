"""Answers by greedy decoding or beam search, in order; and two models compared on the same rows."""

import dataclasses
import io
import logging
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_llava import WORDS, picture, save_tiny_llava

from rlaifv.evaluation import hallucination as hallucination_module
from rlaifv.evaluation.hallucination import (
    Question,
    Split,
    answer_questions,
    calibration,
    hallucination,
    measure,
    paired_test,
    read_question,
)
from rlaifv.inference.decoding import beam_search, best_answers
from rlaifv.inference.sampling import Prompt
from rlaifv.params import EvaluateParams
from rlaifv.records import Instruction
from rlaifv.vlm.chat_format import encode
from rlaifv.vlm.collate import collate_inputs
from rlaifv.vlm.loading import load_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_vlm(str(save_tiny_llava(tmp_path_factory.mktemp("llava"))), device="cpu")


def prompts() -> list[Prompt]:
    """Two lengths, interleaved, each about an image of its own."""
    texts = [
        "describe it .",
        "what is in the image ?",
        "describe it .",
        "is there a red dog ?",
        "what is in the image ?",
    ]
    return [Prompt(Image.open(io.BytesIO(picture(seed))).convert("RGB"), text) for seed, text in enumerate(texts)]


def log_prob(model, prompt: Prompt, answer: str) -> float:
    """Summed log-prob of the answer's words behind the prompt."""
    encoded = encode(model, prompt.image, prompt.text)
    words = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([encoded.prompt_ids + words])
    inputs = collate_inputs(model, [encoded.inputs], [ids.shape[1]])
    with torch.inference_mode():
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0].log_softmax(-1)
    start = len(encoded.prompt_ids)
    return sum(logits[start - 1 + k, word].item() for k, word in enumerate(words))


def test_beam_search_answers_each_prompt_in_its_place_whatever_shares_its_batch(model):
    together = beam_search(model, prompts(), 3, 6)
    assert together == [beam_search(model, [prompt], 3, 6)[0] for prompt in prompts()]
    assert len(set(together)) > 1
    assert set(" ".join(together).split()) <= {*WORDS, "USER", "ASSISTANT", ":", "?", "."}


def test_one_beam_is_greedy_decoding(model):
    assert best_answers(model, prompts(), 1, 6) == beam_search(model, prompts(), 1, 6)


def test_beams_find_likelier_answers_than_greedy_decoding(tmp_path):
    model = load_vlm(str(save_tiny_llava(tmp_path, seed=2)), device="cpu")  # one that greedy decoding leads astray
    # equally long answers, so that likelihoods compare
    pairs = [
        (log_prob(model, prompt, greedy), log_prob(model, prompt, beam))
        for prompt, greedy, beam in zip(
            prompts(), best_answers(model, prompts(), 1, 5), best_answers(model, prompts(), 4, 5), strict=True
        )
        if len(greedy.split()) == len(beam.split())
    ]
    assert all(beam >= greedy - 1e-4 for greedy, beam in pairs)
    assert any(beam > greedy + 1e-3 for greedy, beam in pairs)


def test_a_model_that_answers_with_no_number_is_not_measured(model, tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(picture(0))
    questions = [Question(name, "0.png", "is there a dog ?", "no", "existence") for name in "ab"]
    monkeypatch.setattr(hallucination_module, "judge_fit", lambda vlm, items: [[(0.1, 0.9), (math.nan, 0.9)]])
    with pytest.raises(FloatingPointError, match="of 1 of 2 questions are not finite, first of b"):
        answer_questions(model, Split("test", [], {}, {}, questions, tmp_path), "", 8)


def rows(answers: list[str]) -> list[dict[str, str]]:
    return [
        {"id": str(n), "image": f"{n}.png", "question": "Describe it.", "answer": answer}
        for n, answer in enumerate(answers)
    ]


def hostile_split(tmp_path: Path) -> Split:
    """Four instructions and four questions, of which two each cannot be asked: special tokens, length, no image."""
    (tmp_path / "a.png").write_bytes(picture(0))
    asked = ["describe it .", "a </s> dog", "is there a cat ?", "dog " * 300]
    instructions = [Instruction(f"i{k}", "a.png", question) for k, question in enumerate(asked)]
    questions = [
        Question(f"q{k}", "a.png", text, "yes", "colour") for k, text in enumerate(["a dog ?", "<image> ?", "no ?"])
    ]
    questions.append(Question("q3", "gone.png", "is it ?", "no", "colour"))
    return Split("test", instructions, {"7": {"dog"}}, {"a.png": "7"}, questions, tmp_path)


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_that_cannot_be_put_to_a_model_are_named_counted_and_left_out_of_its_rates(model, tmp_path, caplog, beams):
    split = hostile_split(tmp_path)
    with caplog.at_level(logging.WARNING):
        metrics, answers = measure(model, split, EvaluateParams(beams=beams, max_new_tokens=4, batch_size=3), "")
    assert [row["id"] for row in answers] == ["i0", "i2"] and metrics["n"] == 2
    rejects = {row["id"]: row["reason"] for row in [*metrics["rejects"], *metrics["yes_no"]["rejects"]]}
    assert rejects.keys() == {"i1", "i3", "q1", "q3"} and metrics["yes_no"]["n"] == 2
    assert "'</s>'" in rejects["i1"] and "300 tokens, the context holds 256" in rejects["i3"]
    assert [message.split(" cannot")[0] for message in caplog.messages] == [
        "2 of 4 test instructions",
        "2 of 4 test questions",
    ]


def test_a_split_of_which_nothing_can_be_asked_is_refused(model, tmp_path):
    split = dataclasses.replace(hostile_split(tmp_path), instructions=hostile_split(tmp_path).instructions[1::2])
    with pytest.raises(ValueError, match=r"none of 2 test instructions can be asked; the first: .*'</s>'"):
        measure(model, split, EvaluateParams(beams=1, max_new_tokens=4, batch_size=3), "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "maybe"}, "the answer is yes or no, got 'maybe'"),
        ({"question": None}, "has no field 'question'"),
        ({"question": ["Is it?"]}, "question is .* expected text"),
    ],
)
def test_a_yes_no_question_that_is_none_is_named_with_its_file(row, message):
    whole = {"id": 7, "image_path": "a.png", "question": "<image>\nIs it?", "answer": "yes", "type": "colour"}
    assert read_question(whole, Path("q.jsonl")) == Question("7", "a.png", "Is it?", "yes", "colour")
    with pytest.raises(ValueError, match=rf"^q\.jsonl: .*{message}"):
        read_question(whole | row, Path("q.jsonl"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_that_computes_no_probabilities_answers_nothing_by_greedy_decoding_and_beams(tmp_path, beams, value):
    model = load_vlm(str(save_tiny_llava(tmp_path)), device="cpu")
    model.model.lm_head.weight.data[3] = value
    with pytest.raises(FloatingPointError, match="computes NaN"):
        best_answers(model, prompts()[:2], beams, 4)


def test_the_paired_test_agrees_with_the_rates_and_sees_a_real_difference(tmp_path):
    n = 40
    split = Split("test", [], {str(i): {"dog"} for i in range(n)}, {f"{i}.png": str(i) for i in range(n)}, [], tmp_path)
    base, aligned = rows(["A dog and a cat."] * 20 + ["A dog."] * 20), rows(["A dog."] * n)
    tests = paired_test(base, aligned, split)
    rates = hallucination(base, split), hallucination(aligned, split)
    for name, test in tests.items():
        assert (test["base"], test["aligned"]) == (rates[0][name], rates[1][name])
        assert test["difference"] == pytest.approx(test["aligned"] - test["base"])
        assert test["n"] == n
    assert tests["response_hallucination"]["p_value"] < 0.01
    assert tests["response_hallucination"]["interval"][1] < 0
    assert tests["recall"]["p_value"] == 1
    assert paired_test(base, base, split)["response_hallucination"]["p_value"] == 1


def test_a_reliability_diagram_has_a_row_for_each_bin_that_is_not_empty_and_loses_no_question():
    rows = [{"answer": truth, "p_yes": p, "p_no": 1 - p} for p, truth in ((0.02, "no"), (0.04, "yes"), (1.0, "yes"))]
    low, high = calibration([*rows, {"answer": "yes", "reason": "not asked"}])
    assert low == {"p_yes": pytest.approx(0.03), "yes": 0.5, "n": 2} and high == {"p_yes": 1.0, "yes": 1.0, "n": 1}
    assert calibration([]) == []
