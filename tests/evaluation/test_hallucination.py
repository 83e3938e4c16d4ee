"""Answers by greedy decoding or beam search, in order; and two models compared on the same rows."""

import io
import math

import pytest
import torch
from PIL import Image
from tiny_llava import WORDS, picture, save_tiny_llava

from rlaifv.evaluation import hallucination as hallucination_module
from rlaifv.evaluation.hallucination import Question, Split, answer_questions, hallucination, paired_test
from rlaifv.inference.decoding import beam_search, best_answers
from rlaifv.inference.sampling import Prompt
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


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_is_answered_by_a_model_that_computes_nan(tmp_path, beams):
    model = load_vlm(str(save_tiny_llava(tmp_path)), device="cpu")
    model.model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match="computes NaN instead of probabilities"):
        best_answers(model, prompts(), beams, 6)


def test_a_model_that_answers_with_no_number_is_not_measured(model, tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(picture(0))
    questions = [Question(name, "0.png", "is there a dog ?", "no", "existence") for name in "ab"]
    monkeypatch.setattr(hallucination_module, "judge_many", lambda vlm, items: [[(0.1, 0.9), (math.nan, 0.9)]])
    with pytest.raises(FloatingPointError, match="of 1 of 2 questions are not finite, first of b"):
        answer_questions(model, Split("test", [], {}, {}, questions, tmp_path), "", 8)


def rows(answers: list[str]) -> list[dict[str, str]]:
    return [
        {"id": str(n), "image": f"{n}.png", "question": "Describe it.", "answer": answer}
        for n, answer in enumerate(answers)
    ]


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
