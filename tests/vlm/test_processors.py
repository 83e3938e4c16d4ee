"""Processors load from a checkpoint folder without torchvision, and give the model what it expects."""

import pytest
import torch
from architectures import BUILDERS, QUESTIONS, build, picture

from rlaifv.inference.logprobs import next_token_logprobs
from rlaifv.vlm.chat_format import encode, encode_questions
from rlaifv.vlm.loading import load_vlm


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_checkpoint_loads_and_answers_as_before(name, tmp_path):
    vlm = build(name)
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    loaded = load_vlm(str(tmp_path), device="cpu")
    image = picture(64, 40, 2)
    before, after = (next_token_logprobs(v, [encode_questions(v, image, QUESTIONS)])[0] for v in (vlm, loaded))
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_questions_encoded_together_are_questions_encoded_alone(name):
    vlm, image = build(name), picture(64, 40, 2)
    together = encode_questions(vlm, image, QUESTIONS)
    assert together.rows == [encode(vlm, image, question).prompt_ids for question in QUESTIONS]
    assert all(row[: len(together.prompt_ids)] == together.prompt_ids for row in together.rows)


@pytest.mark.parametrize("name", BUILDERS)
def test_an_image_only_processor_describes_itself(name):
    processor = build(name).processor
    assert type(processor).__name__ in repr(processor)
