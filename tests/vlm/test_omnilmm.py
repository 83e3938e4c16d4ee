"""An OmniLMM computes what its formulas say, and what the original code computed for the golden case."""

import hashlib
import json

import numpy as np
import pytest
import torch
from architectures import picture
from PIL import Image
from published import CONFIGS
from tiny_omnilmm import BLOCKS, CONFIG, HEADS, PATCH, random_weights, save_original
from torch.nn.functional import gelu, layer_norm
from transformers import MistralConfig, MistralForCausalLM

from rlaifv.chat.conversation import Chat
from rlaifv.convert.layouts import Layout
from rlaifv.convert.omnilmm import convert_omnilmm
from rlaifv.inference.decoding import best_answers
from rlaifv.inference.logprobs import continuation_logprobs, next_token_logprobs
from rlaifv.inference.sampling import Prompt
from rlaifv.inference.yes_no import yes_no_ids
from rlaifv.vlm.chat_format import encode, encode_questions
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM, load_vlm
from rlaifv.vlm.omnilmm import OmniLMMConfig, OmniLMMForConditionalGeneration

QUESTION = "Is there a dog in the image?"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp("omnilmm")
    convert_omnilmm(Layout("tiny", "omnilmm", save_original(folder / "released")), folder / "ours", heads=HEADS)
    return load_vlm(str(folder / "ours"), device="cpu")


# ---- the formulas, a step at a time


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel of cubic interpolation."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def stretching(own: int, side: int, antialias: bool) -> torch.Tensor:
    """The (side, own) matrix that enlarges a line. Beyond its ends a line goes on with its last value; the antialiased
    kernel, another one, takes the values that are there in their proportion."""
    matrix = np.zeros((side, own))
    for i in range(side):
        center = (i + 0.5) * own / side - 0.5
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            weight = cubic(np.array(j - center), -0.5 if antialias else -0.75)
            if not antialias or 0 <= j < own:
                matrix[i, min(max(j, 0), own - 1)] += weight
    return torch.tensor(matrix / matrix.sum(1, keepdims=True), dtype=torch.float32)


def enlarged(table: torch.Tensor, side: int, antialias: bool) -> torch.Tensor:
    own = round(len(table) ** 0.5)
    line = stretching(own, side, antialias)
    return torch.einsum("ri,cj,ijd->rcd", line, line, table.view(own, own, -1)).flatten(0, 1)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    size, out = query.shape[-1] // heads, []
    for h in range(heads):
        q, k, v = (x[:, h * size : (h + 1) * size] for x in (query, key, value))
        out.append((q @ k.T * size**-0.5).softmax(-1) @ v)
    return torch.cat(out, -1)


def by_formula(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The vectors (queries, D) of one image (3, H, W)."""
    tower = {name.removeprefix("model.vision_tower."): weight for name, weight in weights.items()}
    resampler = {name.removeprefix("model.resampler."): weight for name, weight in weights.items()}

    def norm(x: torch.Tensor, of: dict, name: str) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], of[f"{name}.weight"], of[f"{name}.bias"], 1e-6)

    side = pixels.shape[1] // PATCH
    patches = [
        pixels[:, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)].flatten()
        for r in range(side)
        for c in range(side)
    ]
    x = torch.stack(patches) @ tower["patch_embed.proj.weight"].flatten(1).T + tower["patch_embed.proj.bias"]
    position = tower["pos_embed"][0]
    x = torch.cat([tower["cls_token"][0] + position[:1], x + enlarged(position[1:], side, antialias=True)])
    for n in range(BLOCKS):
        block = {name.removeprefix(f"blocks.{n}."): weight for name, weight in tower.items()}
        bias = torch.cat([block["attn.q_bias"], torch.zeros_like(block["attn.q_bias"]), block["attn.v_bias"]])
        q, k, v = (x @ block["attn.qkv.weight"].T + bias).chunk(3, -1)
        seen = attention(q, k, v, HEADS) @ block["attn.proj.weight"].T + block["attn.proj.bias"]
        x = x + norm(seen, block, "norm1")
        inner = gelu(x @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
        x = x + norm(inner @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"], block, "norm2")
    x = norm(x, tower, "norm")[1:]
    kv = norm(x @ resampler["kv_proj.weight"].T, resampler, "ln_kv")
    query = norm(resampler["query"], resampler, "ln_q") + resampler["pos_embed"]
    key = kv + enlarged(resampler["pos_embed"], side, antialias=False)
    projections = zip(resampler["attn.in_proj_weight"].chunk(3), resampler["attn.in_proj_bias"].chunk(3), strict=True)
    inputs = [x @ w.T + b for x, (w, b) in zip((query, key, kv), projections, strict=True)]
    out = attention(*inputs, heads=query.shape[-1] // 128)
    out = out @ resampler["attn.out_proj.weight"].T + resampler["attn.out_proj.bias"]
    return norm(out, resampler, "ln_post") @ resampler["proj"]


def test_an_image_becomes_the_vectors_of_the_formulas_and_the_words_around_it_go_through_mistral(tiny):
    weights = random_weights(tiny.model.config.text_config.vocab_size)
    encoded = encode_questions(tiny, picture(64, 40), [QUESTION])
    pixels = encoded.inputs["pixel_values"]
    expected = by_formula(weights, pixels[0])
    with torch.no_grad():
        features = tiny.model.get_image_features(pixels).pooler_output[0]
        torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-5)
        settings = {k: v for k, v in CONFIG.items() if k in MistralConfig.__annotations__ or k == "rope_theta"}
        settings |= {"model_type": "mistral", "vocab_size": len(weights["lm_head.weight"]), "architectures": None}
        mistral = MistralForCausalLM(MistralConfig(**settings)).eval()
        own = {k: v for k, v in weights.items() if "vision_tower" not in k and "resampler" not in k}
        mistral.load_state_dict(own)
        ids = torch.tensor([encoded.rows[0]])
        embeddings = mistral.model.embed_tokens(ids)
        embeddings[ids == tiny.model.config.image_token_id] = expected
        logits = mistral(inputs_embeds=embeddings).logits
        torch.testing.assert_close(tiny.model(ids, pixels).logits, logits, atol=1e-4, rtol=1e-4)


def test_a_picture_is_squashed_the_width_first_then_the_height(tiny):
    image, side = picture(365, 500, seed=3), CONFIG["image_size"]
    expected = image.resize((side, 500), Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC)
    assert (squashed(tiny, image) == np.asarray(expected)).all()


def squashed(vlm: VLM, image: Image.Image) -> np.ndarray:
    """The picture (H, W, 3) as the model gets it, before it is normalized."""
    raw = vlm.processor.image_processor([image], do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert raw.dtype == np.uint8
    return np.ascontiguousarray(raw.transpose(1, 2, 0))


def test_too_few_image_tokens_are_refused(tiny):
    encoded = encode_questions(tiny, picture(), [QUESTION])
    with pytest.raises(ValueError, match="3 image tokens for 1 images of 4 tokens each"):
        ids = [
            token
            for k, token in enumerate(encoded.rows[0])
            if k != encoded.rows[0].index(tiny.processor.image_token_id)
        ]
        tiny.model(torch.tensor([ids]), encoded.inputs["pixel_values"])


def test_an_adapter_does_not_send_gradients_through_the_tower(tiny):
    tiny.model.enable_input_require_grads()  # as with LoRA and recomputed activations
    encoded = encode_questions(tiny, picture(), [QUESTION])
    assert not tiny.model.get_image_features(encoded.inputs["pixel_values"]).pooler_output.requires_grad
    assert tiny.model(torch.tensor(encoded.rows), **encoded.inputs).logits.requires_grad
    tiny.model.disable_input_require_grads()


def test_a_system_turn_takes_the_place_of_the_models_own_sentence(tiny):
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}
    own = tiny.processor.apply_chat_template([asked], add_generation_prompt=True)
    assert own.startswith("<|system|>\nYou are an artificial intelligence assistant, which gives")
    turns = [{"role": "system", "content": "Be brief."}, asked, {"role": "assistant", "content": "No."}]
    assert tiny.processor.apply_chat_template(turns) == (
        "<|system|>\nBe brief.</s>\n<|user|>\n<im_start><im_patch><im_end>\nWhy?</s>\n<|assistant|>\nNo.</s>\n"
    )


def test_transformers_own_generate_counts_an_answers_tokens_alone_for_the_penalty(tiny):
    encoded = encode_questions(tiny, picture(), [QUESTION])
    ids = torch.tensor(encoded.rows)
    said = tiny.model.generate(
        input_ids=ids, **encoded.inputs, repetition_penalty=1.7, do_sample=False, max_new_tokens=12
    )[0, ids.shape[1] :].tolist()
    expected: list[int] = []
    while len(expected) < len(said):
        row = torch.tensor([encoded.rows[0] + expected])
        with torch.no_grad():
            scores = tiny.model(row, encoded.inputs["pixel_values"]).logits[0, -1]
        for token in set(expected):
            scores[token] *= 1.7 if scores[token] < 0 else 1 / 1.7
        expected.append(int(scores.argmax()))
    assert said == expected
    assert best_answers(tiny, [Prompt(picture(), QUESTION)], 1, 12, 1.7) == [
        tiny.tokenizer.decode(said, skip_special_tokens=True).strip()
    ]


def test_beams_with_a_penalty_are_transformers_own(tiny):
    settings = {"num_beams": 3, "do_sample": False, "repetition_penalty": 20.0, "max_new_tokens": 12}
    changed = []
    for seed in range(6):
        prompt = Prompt(picture(seed=seed), QUESTION)
        encoded = encode_questions(tiny, prompt.image, [QUESTION])
        ids = torch.tensor(encoded.rows)
        said = tiny.model.generate(input_ids=ids, **encoded.inputs, **settings)[0, ids.shape[1] :]
        found = best_answers(tiny, [prompt], 3, 12, 20.0)
        assert found == [tiny.tokenizer.decode(said, skip_special_tokens=True).strip()]
        changed.append(found != best_answers(tiny, [prompt], 3, 12))
    assert any(changed), "the penalty does something"


# ---- the golden case: what the original code computed


@pytest.fixture(scope="module")
def golden(shared) -> dict:
    folder = shared / "golden_models" / "omnilmm"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: what the original code computed is not part of the repository")
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def vlm(golden, shared, tmp_path_factory) -> VLM:
    out = tmp_path_factory.mktemp("golden") / "ours"
    source = Layout("golden", "omnilmm", shared / "golden_models" / "omnilmm" / "checkpoint")
    convert_omnilmm(source, out, heads=golden["tiny_vision"]["num_heads"])
    return load_vlm(str(out), device="cpu")


@pytest.fixture(scope="module")
def photograph(shared) -> Image.Image:
    return open_image(shared / "real" / "examples" / "test.jpeg")


def near(values: torch.Tensor, expected: list[float]) -> bool:
    return bool((values.double() - torch.tensor(expected).double()).abs().max() <= 1e-4)


def test_pixels_are_bit_equal_and_features_are_the_originals(vlm, golden, photograph):
    (case,) = golden["cases"]
    assert hashlib.sha256(squashed(vlm, photograph).tobytes()).hexdigest() == case["pixel_uint8_sha256"]
    pixels = encode_questions(vlm, photograph, [case["question"]]).inputs["pixel_values"]
    assert near(pixels[0].flatten()[:8], case["pixel_values"]["first"])
    with torch.no_grad():
        seen = vlm.model.get_image_features(pixels)
    assert near(seen.last_hidden_state.flatten()[-8:], case["vision_tower_tokens_with_cls"]["last"])
    assert near(seen.pooler_output.flatten()[:8], case["image_features"]["first"])
    assert near(seen.pooler_output.flatten()[-8:], case["image_features"]["last"])


def test_tokens_are_the_originals_in_one_turn_in_two_and_in_training(vlm, golden, photograph):
    (case,) = golden["cases"]
    for asked in (case, case["yes_no"]):
        assert encode_questions(vlm, photograph, [asked["question"]]).rows == [asked["input_ids"]]
    first, answer, second = (message["content"] for message in golden["two_turns"]["messages"])
    chat = Chat(vlm, photograph, history=[(first, answer)])
    assert chat.encode(second).prompt_ids == golden["two_turns"]["input_ids"]
    trained = golden["training"]
    encoded = encode(vlm, photograph, case["question"], [trained["messages"][1]["content"]])
    assert encoded.rows == [trained["input_ids"]]
    assert encoded.answer_starts == [sum(label == -100 for label in trained["labels"])]


def test_logits_answers_and_the_log_probs_of_an_answer_are_the_originals(vlm, golden, photograph):
    (case,) = golden["cases"]
    encoded = encode_questions(vlm, photograph, [case["question"]])
    with torch.no_grad():
        logits = vlm.model(torch.tensor(encoded.rows), **encoded.inputs).logits[0, -1]
    expected = case["last_position"]
    assert near(logits[:32], expected["first_32"]) and near(logits[expected["top5_ids"]], expected["top5_logits"])
    prompt = Prompt(photograph, case["question"])
    for ids, beams, penalty in [
        ("greedy_ids", 1, 1.0),
        ("greedy_repetition_penalty_1.1_ids", 1, 1.1),
        ("beam3_repetition_penalty_1.1_ids", 3, 1.1),
    ]:
        said = vlm.tokenizer.decode(case[ids], skip_special_tokens=True).strip()
        assert best_answers(vlm, [prompt], beams, len(case[ids]), penalty) == [said], ids
    (answered,) = continuation_logprobs(
        vlm, [encode(vlm, photograph, case["question"], [golden["training"]["messages"][1]["content"]])]
    )
    assert near(answered[0], golden["training"]["per_token_logp"])
    assert abs(answered[0].sum().item() - golden["training"]["sum_logp"]) <= 1e-4


def test_yes_and_no_have_the_originals_probabilities(vlm, golden, photograph):
    expected = golden["cases"][0]["yes_no"]
    ids = expected["token_ids"]
    known = yes_no_ids(vlm)
    assert {*known.yes} == {ids["yes"], ids["Yes"]} and {*known.no} == {ids["no"], ids["No"]}
    encoded = encode_questions(vlm, photograph, [expected["question"]])
    (found,) = next_token_logprobs(vlm, [encoded], list(ids.values()))
    assert near(found[0].exp(), [expected["probabilities"][name] for name in ids])


def test_the_12b_has_as_many_parameters_as_published():
    with torch.device("meta"):
        model = OmniLMMForConditionalGeneration(OmniLMMConfig(**CONFIGS["data/checkpoints/omnilmm-12b"]))
    assert model.model.vision_tower.num_parameters() == 4_280_795_904
    resampler = model.model.resampler
    assert sum(x.numel() for x in resampler.state_dict().values()) == 91_791_360
