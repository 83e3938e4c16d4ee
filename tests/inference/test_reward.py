"""A reward model's scores: the same shared and plain, of this image, in this prompt and no other."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from architectures import ANSWERS, BUILDERS, QUESTIONS, build, picture, vlm_of
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from rlaifv.inference.logprobs import run_rows
from rlaifv.inference.reward import Rated, score, score_rows
from rlaifv.training.checkpoints import write_checkpoint
from rlaifv.vlm.chat_format import EncodedPrompt, UnfitText, common_length, encode, prompt_text, render, turn
from rlaifv.vlm.images import open_image
from rlaifv.vlm.reward_format import (
    FORMAT,
    RewardFormat,
    RewardHead,
    RewardModel,
    encode_answers,
    load_reward_model,
    write_reward_files,
)

PLAIN = RewardFormat(" user: Is this right? Yes or no ASSISTANT:", "", "{}", "base", "random")
FACTUAL = dataclasses.replace(PLAIN, prompt=" user: see {factual_prompt} Is this right?", fact_line="- {}\n")
FACTS = ["a red kite", "two cats"]


def reward_model(name: str = "llava", form: RewardFormat = PLAIN) -> RewardModel:
    vlm = build(name)
    head = RewardHead(vlm.network.get_decoder().config.hidden_size).requires_grad_(False)
    return RewardModel(vlm, head, form)


def by_hand(model: RewardModel, rated: Rated, answer: str) -> float:
    """One row through the model's own forward: its last hidden state times the vector."""
    encoded = encode_answers(model.vlm, model.format, rated.image, rated.question, [answer], rated.facts)
    seen = []
    hook = model.vlm.network.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run_rows(model.vlm, [encoded], lambda logits, _: logits[:, 0], shared=False)
    hook.remove()
    return float(seen[0][0, -1].float() @ model.head.weight[0] + model.head.bias)


@pytest.mark.parametrize("name", BUILDERS)
def test_answers_that_share_image_and_prompt_are_scored_as_one_by_one(name):
    model = reward_model(name, FACTUAL)
    rated = [
        Rated(picture(), QUESTIONS[0], [*ANSWERS, ANSWERS[0]], FACTS),
        Rated(picture(seed=2), "What?", ANSWERS, FACTS),
    ]
    plain = [[by_hand(model, item, answer) for answer in item.answers] for item in rated]
    for found in (score(model, rated), score(model, rated, shared=False)):
        for row, expected in zip(found, plain, strict=True):
            assert row == pytest.approx(expected, abs=1e-4)
    assert len(set(plain[0])) == 3, "equal answers have equal scores, others do not"


def test_the_output_layer_is_back_after_scoring():
    model = reward_model("gemma3")
    config = model.vlm.network.config.get_text_config()
    config.final_logit_softcapping, head = 0.1, model.vlm.network.get_output_embeddings()
    (scores,) = score(model, [Rated(picture(), "What?", ANSWERS)])
    assert max(map(abs, scores)) > 0.1, "a soft cap is for logits"
    assert model.vlm.network.get_output_embeddings() is head and config.final_logit_softcapping == 0.1


def test_the_image_and_the_facts_change_scores_and_their_absence_is_refused():
    model, answers = reward_model("llava", FACTUAL), ANSWERS[:1]
    asked = [
        Rated(picture(), "What?", answers, FACTS),
        Rated(picture(seed=5), "What?", answers, FACTS),
        Rated(picture(), "What?", answers, FACTS[::-1]),
        Rated(picture(), "What?", []),
    ]
    (one,), (other_image,), (other_order,), nothing = score(model, asked)
    assert one != pytest.approx(other_image, abs=1e-3) and one != pytest.approx(other_order, abs=1e-3)
    assert nothing == []
    with pytest.raises(ValueError, match="trained with facts about the image, and there are none"):
        score(model, [Rated(picture(), "What?", answers)])
    with pytest.raises(ValueError, match="trained without facts, and some are given"):
        score(reward_model(), [Rated(picture(), "What?", answers, FACTS)])
    with pytest.raises(UnfitText, match="</s>"):
        score(model, [Rated(picture(), "What?", answers, ["a cat</s>"])])


def test_a_score_that_is_not_finite_stops():
    model = reward_model()
    model.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="llava gives rewards that are not finite"):
        score(model, [Rated(picture(), "What?", ANSWERS)])


def test_a_conversation_of_several_turns_is_read_as_the_template_renders_it():
    vlm = build("llava")
    talk = ["Is it a dog?", "No.", "What is it?"]
    roles = zip(("user", "assistant", "user"), talk, (True, False, False), strict=True)
    assert prompt_text(vlm, talk) == render(vlm, [turn(vlm, *said) for said in roles], add_generation_prompt=True)
    encoded = encode_answers(vlm, PLAIN, picture(), talk, ["A cat."])
    conversation = encode(vlm, picture(), talk, ["A cat."]).rows[0]
    assert encoded.rows[0][: len(conversation)] == conversation
    assert vlm.tokenizer.decode(encoded.rows[0][len(conversation) :]) == PLAIN.prompt
    assert encode(vlm, picture(), "What?").rows == encode(vlm, picture(), ["What?"]).rows


@pytest.fixture
def saved(tmp_path):
    model = reward_model("llava", FACTUAL)
    folder = tmp_path / "rm"
    write_checkpoint(model.vlm.model, model.vlm.processor, folder, "float32")
    write_reward_files(folder, model.head, model.format, model.vlm)
    return model, folder


def test_a_saved_reward_model_gives_the_same_scores(saved):
    model, folder = saved
    loaded, rated = load_reward_model(str(folder)), [Rated(picture(), "What?", ANSWERS, FACTS)]
    assert score(loaded, rated)[0] == pytest.approx(score(model, rated)[0], abs=1e-6)
    assert dataclasses.replace(loaded.format, example=[]) == model.format


def test_a_prompt_other_than_the_trained_one_is_refused_with_the_place(saved):
    _, folder = saved
    content = json.loads((folder / FORMAT).read_text())
    (folder / FORMAT).write_text(json.dumps(content | {"prompt": content["prompt"].replace("right", "wrong")}))
    with pytest.raises(ValueError, match=r"not the one it was trained with: at token \d+ .*scores would mean nothing"):
        load_reward_model(str(folder))
    (folder / FORMAT).write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(ValueError, match=r"reward\.json has prompt, expected prompt, facts_intro"):
        load_reward_model(str(folder))


def test_a_tokenizer_that_reads_the_prompt_otherwise_is_refused(saved):
    _, folder = saved
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER: ", "USER:"))
    with pytest.raises(ValueError, match="not the one it was trained with: at token 2"):
        load_reward_model(str(folder))


def test_a_checkpoint_without_prompt_or_with_another_vector_is_no_reward_model(saved):
    model, folder = saved
    write_reward_files(folder, RewardHead(3), model.format, model.vlm)
    with pytest.raises(ValueError, match=r"reward_head\.safetensors does not fit it"):
        load_reward_model(str(folder))
    (folder / FORMAT).unlink()
    with pytest.raises(FileNotFoundError, match=r"is no reward model: it has no reward\.json"):
        load_reward_model(str(folder))


def llava_rlhf(golden: Path) -> RewardModel:
    """LLaVA-RLHF's reward model in its released layout: a linear projector, the tower beside it, LoRA to be added."""
    sft, tower, lora = (
        load_file(golden / f"{name}.safetensors")
        for name in ("sft_model/model", "clip_tower/model", "rm_lora_adapter_model/adapter_model")
    )
    config = json.loads((golden / "sft_model/config.json").read_text())
    adapter = json.loads((golden / "rm_lora_adapter_model/adapter_config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    text = LlamaConfig(**{name: config[name] for name in sizes}, vocab_size=config["vocab_size"] + 1, bos_token_id=1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**json.loads((golden / "clip_tower/config.json").read_text())),
            text_config=text,
            image_token_index=config["vocab_size"],
            projector_hidden_act="linear",
            vision_feature_layer=config["mm_vision_select_layer"],
        )
    )
    weights = model.state_dict()
    for name, weight in {key: value.float() for key, value in sft.items() if "rotary" not in key}.items():
        if (a := f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight") in lora:
            scale = adapter["lora_alpha"] / adapter["r"]
            weight = weight + scale * lora[a.replace("lora_A", "lora_B")].float() @ lora[a].float()
        if "mm_projector" in name:
            name = name.replace("mm_projector", "multi_modal_projector.linear_1")
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        weights[name][: len(weight)] = weight  # its vocabulary has one row less: <image> is none of its tokens
    weights["model.multi_modal_projector.linear_2.weight"].copy_(torch.eye(config["hidden_size"]))
    weights["model.multi_modal_projector.linear_2.bias"].zero_()
    for name, weight in tower.items():
        weights[name.replace("vision_model.", "model.vision_tower.", 1)].copy_(weight)
    head = RewardHead(config["hidden_size"]).requires_grad_(False)
    head.load_state_dict(load_file(golden / "rm_lora_adapter_model/reward_head.safetensors"))
    tokenizer = build("llava").tokenizer
    return RewardModel(vlm_of(model.eval(), tokenizer, CLIPImageProcessorPil(), "llava-rlhf"), head, PLAIN)


def test_the_released_layout_of_llava_rlhf_gives_the_original_rewards(shared):
    golden = shared / "golden_models" / "llava_rlhf"
    model = llava_rlhf(golden)
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    prepare = CLIPImageProcessorPil(**size)
    photo = open_image(shared / "real" / "examples" / "test.jpeg")
    square = Image.new("RGB", (max(photo.size),) * 2, tuple(int(255 * mean) for mean in prepare.image_mean))
    square.paste(photo, tuple((max(photo.size) - side) // 2 for side in photo.size))
    inputs = dict(prepare(square, return_tensors="pt"))
    cases = json.loads((golden / "expected.json").read_text())["rewards"]
    image_token = model.vlm.network.config.image_token_id
    rows = [[j for i in case["input_ids"] for j in ([image_token] * 576 if i == -200 else [i])] for case in cases]
    common = min(common_length(rows[0], row) for row in rows)
    encoded = EncodedPrompt(rows[0][:common], rows, [len(row) for row in rows], inputs)
    for way in (None, False):
        assert score_rows(model, [encoded], shared=way)[0] == pytest.approx([c["reward"] for c in cases], abs=1e-4)
