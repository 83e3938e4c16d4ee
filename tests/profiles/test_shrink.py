"""A model in small keeps of the published one what its prompts, images and layout depend on, and works."""

import dataclasses
from functools import cache

import pytest
import torch
from architectures import picture
from lookalikes import write_repository
from published import CONFIGS
from transformers import AutoConfig

from rlaifv import ROOT
from rlaifv.inference.yes_no import judge, yes_no_ids
from rlaifv.params import load_params
from rlaifv.profiles.shrink import random_checkpoint, scaled, shrink, teach_to_divide
from rlaifv.steps.divide import divide_answers
from rlaifv.vlm.chat_format import encode, folded_prompt
from rlaifv.vlm.loading import load_vlm

IMAGE_TOKENS = {"llava": 576, "llava_next": 2340, "qwen3_vl": 300, "rlaifv_omnilmm": 64}
"""Of a photo of 640 × 480 pixels, by the published patches, tiles and merging."""
IMAGE_TOKENS_OF = {"data/checkpoints/llava-rlhf-7b": 256, "data/checkpoints/llava-sft-7b": 256}
"""LLaVA-RLHF's 7B looks at 224 pixels instead of 336."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The folder of a look-alike, written once."""
    folder = tmp_path_factory.mktemp("repositories")
    return cache(lambda name: write_repository(folder, name))


def test_every_hub_model_of_a_profile_has_a_look_alike():
    profiles = [load_params(path) for path in (ROOT / "params").glob("*.yaml")]
    models = {model.path for p in profiles for model in (p.policy, p.labeler, p.divider)}
    assert {path for path in models if not (ROOT / path).is_dir()} <= CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_small_configuration_keeps_the_ratios_that_matter(name, repository):
    whole = AutoConfig.from_pretrained(repository(name))
    small = shrink(whole)
    text, was = small.get_text_config(), whole.get_text_config()
    assert text.vocab_size == was.vocab_size and small.tie_word_embeddings == whole.tie_word_embeddings
    assert text.num_attention_heads / text.num_key_value_heads == was.num_attention_heads / was.num_key_value_heads
    assert text.intermediate_size / text.hidden_size == pytest.approx(was.intermediate_size / was.hidden_size, rel=0.1)
    assert text.num_hidden_layers < was.num_hidden_layers and text.hidden_size <= 256
    sections = (text.rope_parameters or {}).get("mrope_section")
    assert sections is None or sum(sections) == text.head_dim // 2
    if hasattr(whole, "vision_config"):
        for kept in ("image_size", "patch_size", "spatial_merge_size", "num_position_embeddings"):
            assert getattr(small.vision_config, kept, None) == getattr(whole.vision_config, kept, None)
        assert small.vision_config.hidden_size == 64
        deepstack = getattr(small.vision_config, "deepstack_visual_indexes", [])
        assert len(deepstack) == len(getattr(whole.vision_config, "deepstack_visual_indexes", []))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_small_model_is_loaded_and_asked_like_a_large_one(name, repository, tmp_path):
    random_checkpoint(repository(name), tmp_path / "small", "bfloat16")
    vlm = load_vlm(str(tmp_path / "small"), dtype="bfloat16", device="cpu")
    assert vlm.model.num_parameters() < 80e6 and vlm.model.dtype == torch.bfloat16
    if vlm.sees_images:
        _, tokens = folded_prompt(vlm, picture(640, 480), "What is in the image?")
        assert tokens == IMAGE_TOKENS_OF.get(name, IMAGE_TOKENS[vlm.model.config.model_type])
        assert yes_no_ids(vlm).yes
        ((p_yes, p_no),) = judge(vlm, picture(640, 480), ["Is there a dog? Please answer yes or no."])
        assert 0 < p_yes < 1 and 0 < p_no < 1
    else:
        ids = torch.tensor([encode(vlm, None, "What is this?").prompt_ids])
        assert vlm.model(ids).logits.isfinite().all()


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "llava-hf/llava-1.5-7b-hf"])
def test_a_divider_that_was_taught_replies_with_one_claim_and_one_question(name, repository, tmp_path):
    random_checkpoint(repository(name), tmp_path / "small", "bfloat16", divides=True)
    vlm = load_vlm(str(tmp_path / "small"), dtype="bfloat16", device="cpu")
    bullet = vlm.tokenizer("- ", add_special_tokens=False)["input_ids"]
    teach_to_divide(vlm.model, encode(vlm, None, "Divide.").prompt_ids, bullet, vlm.eos_token_ids[0])
    asked = [("What is this?", f"It is a dog and {number} cats.") for number in range(8)]
    params = dataclasses.replace(load_params("params/llava15-7b.yaml").divide, max_new_tokens=16)
    divisions = divide_answers(vlm, asked, params, seed=0)
    assert [len(d.claims) for d in divisions] == [len(d.questions) for d in divisions] == [1] * len(asked), divisions
    assert len({d.claims[0] for d in divisions}) > 4, "random words"


@pytest.mark.parametrize(
    ("section", "factor", "small"),
    [([16, 24, 24], 1 / 4, [4, 6, 6]), ([24, 20, 20], 1 / 4, [6, 5, 5]), ([11, 11, 10], 1 / 8, [1, 2, 1])],
)
def test_rotary_sections_stay_whole_numbers_that_add_up(section, factor, small):
    assert scaled(section, factor) == small and sum(small) == sum(section) * factor
