"""The self-check takes no noise for a wrong mask and no wrong mask for noise, in bfloat16 and at sixty layers."""

import os

import pytest
import torch
from architectures import BUILDERS, QUESTIONS, build, build_tokenizer, picture, template, text_settings, vlm_of
from transformers import LlamaConfig, LlamaForCausalLM

from rlaifv.inference import prefix_cache
from rlaifv.inference.logprobs import run_shared
from rlaifv.inference.plain_rows import run_copied, run_plain
from rlaifv.inference.self_check import Float32, checked_rows, disagreement, distance, full_distribution, in_float32
from rlaifv.vlm.chat_format import encode, encode_questions
from rlaifv.vlm.loading import VLM

WIDTH = 64
SEEDS = int(os.environ.get("SEEDS", "3"))  # SEEDS=24 takes minutes


def deep(seed: int) -> VLM:
    """Narrow and random, with the noise of sixty layers and the logit spread of a trained model."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer({}, template(""))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings = text_settings(tokenizer, hidden_size=WIDTH, num_hidden_layers=60, **heads)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    torch.nn.init.normal_(model.lm_head.weight, std=3 / WIDTH**0.5)
    return vlm_of(model.to(torch.bfloat16), tokenizer, None, f"deep-{seed}")


def neighbor_seen(mask, width, owner):
    mask[:, :, owner[0] == 1, width + int((owner[0] == 0).nonzero()[-1])] = 0


def prefix_token_missed(mask, width, owner):
    mask[:, :, owner[0] == 1, width // 2] = torch.finfo(mask.dtype).min


@pytest.mark.parametrize("seed", range(SEEDS))
def test_noise_is_accepted_and_a_mask_wrong_by_one_token_is_not(seed, monkeypatch):
    vlm = deep(seed)
    encoded = encode_questions(vlm, None, QUESTIONS)
    assert disagreement(vlm, encoded, run_shared) is None
    assert disagreement(vlm, encoded, run_copied) is None
    real = prefix_cache.branch_masks
    for spoil in (neighbor_seen, prefix_token_missed):

        def wrong(vlm, state, owner, offset, newest, spoil=spoil):
            mask = real(vlm, state, owner, offset, newest).clone()
            spoil(mask, state.width, owner)
            return mask

        monkeypatch.setattr(prefix_cache, "branch_masks", wrong)
        assert "nats" in disagreement(vlm, encoded, run_shared)


@pytest.mark.parametrize("name", [*BUILDERS, "llama"])
def test_a_bfloat16_model_computed_in_float32_is_the_float32_model(name):
    vlm = build(name)
    vlm.model.to(torch.bfloat16)
    encoded = encode_questions(vlm, picture() if vlm.sees_images else None, QUESTIONS)
    trees = [checked_rows(encoded)]
    widened = in_float32(vlm, trees)
    assert vlm.network.dtype == torch.bfloat16, "its weights stay"
    assert disagreement(vlm, encoded, run_copied) is None
    vlm.model.float()
    assert distance(run_plain(vlm, trees, full_distribution), widened) < 1e-4


def test_only_places_that_are_asked_are_compared():
    vlm = deep(0)
    encoded = encode(vlm, None, QUESTIONS[3], ["A dog.", "There is a cat on the table and a red umbrella."])
    tree = checked_rows(encoded)
    for branch, wanted in zip(tree.branches, tree.wanted, strict=True):
        assert len(wanted) <= 8 and wanted.stop == len(branch)
    assert all(vlm.tokenizer.eos_token_id not in branch for branch in tree.branches)


def test_convolutions_do_not_round_in_float32():
    before = torch.backends.cudnn.allow_tf32
    with Float32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
