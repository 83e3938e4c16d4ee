"""A model that is spread over two accelerators answers as it does on one."""

import numpy as np
import pytest
import torch
from architectures import ANSWERS, QUESTIONS, build, picture
from made_up_devices import FIRST, SECOND, MadeUpDevices, spread

from rlaifv.inference import memory
from rlaifv.inference.decoding import best_answers
from rlaifv.inference.logprobs import continuation_logprobs, next_token_logprobs
from rlaifv.inference.sampling import Decoding, Prompt, generate_batch
from rlaifv.vlm.chat_format import encode, encode_questions
from rlaifv.vlm.loading import VLM


def everything(vlm: VLM, shared: bool | None) -> tuple:
    """Yes/no log-probs, those of answers, samples that end at different lengths, and a beam search."""
    questions = [encode_questions(vlm, picture(40, 40, seed), QUESTIONS[:3]) for seed in (1, 2)]
    prompts = [Prompt(picture(40, 40, seed), QUESTIONS[seed]) for seed in (1, 2)]
    streams = list(np.random.default_rng(0).random((2, 4, 20)))
    return (
        next_token_logprobs(vlm, questions, [5, 3], shared=shared),
        continuation_logprobs(vlm, [encode(vlm, picture(), QUESTIONS[3], ANSWERS)], shared=shared),
        generate_batch(vlm, prompts, streams, Decoding(1.0, 20, 0.9, 20), shared),
        best_answers(vlm, prompts[:1], 2, 4),
    )


SPREAD = [
    ("llava", None),
    ("llava", False),
    ("qwen2.5-vl", None),
    ("gemma3", None),
    ("minicpm-v-4.6", None),
    ("omnilmm", None),
]


@pytest.mark.parametrize(("name", "shared"), SPREAD)
def test_two_devices_give_what_one_gives(name, shared, monkeypatch):
    monkeypatch.setattr(memory, "free_memory_for", lambda vlm: None)  # nobody can ask a made-up device
    vlm = build(name)
    if name == "llava":
        vlm.model.to(torch.bfloat16)
    expected = everything(vlm, shared)
    with MadeUpDevices():
        spread(vlm)
        assert vlm.device == FIRST
        found = everything(vlm, shared)
    assert str(found) == str(expected)


def test_the_made_up_devices_refuse_what_cuda_refuses():
    with MadeUpDevices():
        first, second = torch.arange(3, device=FIRST), torch.arange(3, device=SECOND)
        for mixing in (lambda: first + second, lambda: first[second], lambda: first.gather(0, second)):
            with pytest.raises(RuntimeError, match="cuda:0 and cuda:1"):
                mixing()
        assert first.to(second.device).device == SECOND and first[torch.arange(2)].device == FIRST
