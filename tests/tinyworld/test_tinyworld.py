"""The embedded world: its scenes, files, language and the checkpoints that ship with it."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from rlaifv import ROOT
from rlaifv.steps.divide import CLAIMS_PROMPT, QUESTIONS_PROMPT
from rlaifv.tinyworld.backbone import build_vlm, cached_features, pixel_values
from rlaifv.tinyworld.coco import COCO_IDS, read_scenes, write_world
from rlaifv.tinyworld.divider import claims_reply, questions_reply, random_answer
from rlaifv.tinyworld.exams import answer_accuracy, describe, division_accuracy, hallucination
from rlaifv.tinyworld.language import (
    BRIEF_REMARKS,
    INSTRUCTIONS,
    OPINIONS,
    PARTNERS,
    STYLES,
    TYPES,
    YES_NO,
    caption,
    claim_type,
    claims,
    imagined_caption,
    is_true,
    random_claim,
    sentence,
    to_question,
)
from rlaifv.tinyworld.lesson_rows import Packer, target_logits
from rlaifv.tinyworld.make_checkpoints import save
from rlaifv.tinyworld.scenes import CLASSES, CONTEXTS, Group, Scene, make_scene, render
from rlaifv.tinyworld.tokenizer import build_processor, build_tokenizer
from rlaifv.training.checkpoints import write_checkpoint
from rlaifv.vlm.loading import load_vlm

MODELS = ROOT / "models" / "tiny"
UNSEEN = [make_scene(77, number) for number in range(60)]
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3, train=20, dev=8, test=8)
    return folder


@pytest.fixture(scope="module")
def labeler():
    return AutoModelForImageTextToText.from_pretrained(MODELS / "labeler", dtype=torch.float32)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForImageTextToText.from_pretrained(MODELS / "policy", dtype=torch.float32)


def test_a_scene_depends_on_its_seed_and_id_alone():
    assert make_scene(1, 5) == make_scene(1, 5)
    assert render(make_scene(1, 5), 1).tobytes() == render(make_scene(1, 5), 1).tobytes()
    assert make_scene(1, 5) != make_scene(2, 5)


@given(seeds)
def test_a_scene_has_distinct_classes_of_one_context_in_distinct_cells(seed):
    scene = make_scene(seed, 0)
    names, cells = [g.name for g in scene.groups], [g.cell for g in scene.groups]
    assert 2 <= len(scene.groups) <= 4
    assert set(names) <= set(CONTEXTS[scene.context]) and len(set(names)) == len(names)
    assert cells == sorted(set(cells))


def test_the_world_is_written_byte_for_byte_again(world, tmp_path):
    write_world(tmp_path, seed=3, train=20, dev=8, test=8)
    for path in world.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(world)).read_bytes(), path.name


def test_no_scene_is_in_two_splits(world):
    seen = [set(read_scenes(world / f"instances_{split}.json")) for split in ("train", "dev", "test")]
    groups = [
        {scene.groups for scene in read_scenes(world / f"instances_{split}.json").values()}
        for split in ("train", "dev", "test")
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not seen[a] & seen[b] and not groups[a] & groups[b]


def test_the_coco_files_agree_with_the_scenes_and_the_images(world):
    data = json.loads((world / "instances_train.json").read_text())
    assert {c["name"]: c["id"] for c in data["categories"]} == COCO_IDS
    scenes = read_scenes(world / "instances_train.json")
    assert list(scenes) == [image["id"] for image in data["images"]]
    for image in data["images"]:
        assert scenes[image["id"]] == make_scene(3, image["id"])
        assert (world / "images" / image["file_name"]).exists()
    for row in data["annotations"]:
        x, y, w, h = row["bbox"]
        assert 0 <= x < x + w <= 216 and 0 <= y < y + h <= 216 and 0 < row["area"] <= w * h


def test_captions_instructions_and_questions_are_true_of_their_image(world):
    scenes = read_scenes(world / "instances_test.json")
    captions = json.loads((world / "captions_test.json").read_text())["annotations"]
    assert len(captions) == 5 * len(scenes)
    assert all(is_true(claim, scenes[row["image_id"]]) for row in captions for claim in claims(row["caption"]))
    for line in (world / "instructions_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["question"] in INSTRUCTIONS
        assert all(is_true(claim, scenes[int(row["image_path"][:12])]) for claim in claims(row["reference"]))
    answers = dict.fromkeys(TYPES, 0)
    for line in (world / "questions_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        true = is_true(row["claim"], scenes[int(row["image_path"][:12])])
        assert row["answer"] == ("yes" if true else "no")
        assert row["question"] == to_question(row["claim"]) and row["type"] == claim_type(row["claim"])
        answers[row["type"]] += 1 if true else -1
    assert all(abs(balance) <= 1 for balance in answers.values())


@settings(max_examples=50)
@given(seeds)
def test_every_text_of_the_world_survives_the_tokenizer(tokenizer, seed):
    rng = random.Random(seed)
    answer = random_answer(rng, 8)
    listed = claims(answer)
    texts = [
        answer,
        claims_reply(answer),
        questions_reply(listed),
        CLAIMS_PROMPT.format(question=rng.choice(INSTRUCTIONS), answer=answer),
        QUESTIONS_PROMPT.format(claims="\n".join(f"- {claim}" for claim in listed)),
        f"USER: {rng.choice(INSTRUCTIONS)} {YES_NO} ASSISTANT: Yes",
    ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


@given(seeds)
def test_a_true_caption_makes_true_claims_and_a_phantom_false_ones(seed):
    rng, scene = random.Random(seed), make_scene(seed, 1)
    assert all(is_true(claim, scene) for claim in claims(caption(scene.groups, rng)))
    triggers = [g for g in scene.groups if g.name in PARTNERS]
    always, never = 1 / min(style.imagines for style in STYLES), 0.0
    imagined, remarked = (claims(imagined_caption(scene, rng, phantom)) for phantom in (always, never))
    assert sum(not is_true(claim, scene) for claim in imagined) == 3 * len(triggers)
    assert len(imagined) == 3 * (len(scene.groups) + len(triggers))
    assert remarked == claims(caption(scene.groups, rng))


def test_a_partner_is_never_of_the_context_of_its_trigger():
    context = {name: context for context, names in CONTEXTS.items() for name in names}
    assert all(context[name] != context[partner] for name, (partner, _) in PARTNERS.items())


@given(seeds, st.sampled_from(TYPES), st.booleans())
def test_a_random_claim_is_as_true_as_asked_for(seed, kind, answer):
    scene = make_scene(seed, 2)
    claim = random_claim(scene, kind, answer, random.Random(seed))
    assert claim is None or (is_true(claim, scene) == answer and claim_type(claim) == kind)


def test_a_sentence_makes_three_claims_and_an_opinion_none():
    text = "There are two red mice at the top-left. A blue cup is at the center. " + OPINIONS[0]
    assert claims(text) == [
        "There are two mice in the image.",
        "The mice are red.",
        "The mice are at the top-left.",
        "There is a cup in the image.",
        "The cup is blue.",
        "The cup is at the center.",
    ]
    assert [to_question(claim) for claim in claims(text)[:3]] == [
        "Are there two mice in the image?",
        "Are the mice red?",
        "Are the mice at the top-left?",
    ]
    assert claims("Two red mice, top-left. " + BRIEF_REMARKS[0]) == claims(text)[:3]
    assert (
        claims("There is a red bus,")
        == claims("I can see a red bus at")
        == ["There is a bus in the image.", "The bus is red."]
    )
    assert claims(OPINIONS[1]) == []


def test_a_brief_description_makes_the_claims_of_a_full_one_in_two_thirds_of_its_tokens(tokenizer):
    scene = UNSEEN[0]
    told = [" ".join(sentence(group, style) for group in scene.groups) for style in STYLES]
    tokens = [len(tokenizer(text).input_ids) for text in told]
    assert len({tuple(claims(text)) for text in told}) == 1
    assert all(brief <= 0.7 * full for full, brief in zip(tokens[:3], tokens[3:], strict=True))


def test_an_answer_ends_with_no_opinion_one_or_several_different_ones():
    rng = random.Random(0)
    texts = [caption(UNSEEN[0].groups, rng) for _ in range(300)]
    said = [[text.count(opinion) for opinion in OPINIONS] for text in texts]
    assert {sum(counts) for counts in said} >= {0, 1, 2} and max(map(max, said)) == 1


def test_text_that_is_no_claim_is_refused_with_the_text():
    scene = Scene(0, "kitchen", (Group("cup", "red", 1, 0),))
    with pytest.raises(ValueError, match=r"'The cup is heavy\.'"):
        is_true("The cup is heavy.", scene)


def test_a_packed_branch_equals_its_question_asked_alone(labeler, tokenizer):
    scene = UNSEEN[0]
    features = cached_features(labeler, pixel_values([scene], 77, build_processor(tokenizer)))
    branches = [(f"Is there a {name} in the image? {YES_NO}", "Yes", 1.0) for name in CLASSES[:5]]
    branches.append((INSTRUCTIONS[2], caption(scene.groups, random.Random(0)), 1.0))
    packer, language_model = Packer(tokenizer), labeler.model.language_model
    with torch.no_grad():
        together = target_logits(language_model, packer.pack([branches]), features)
        alone = [target_logits(language_model, packer.pack([[branch]]), features) for branch in branches]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_the_checkpoints_are_ordinary_small_and_safe():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".py"}]
    for name in ("policy", "labeler"):
        processor = AutoProcessor.from_pretrained(MODELS / name)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == "USER: <image>\nIs it? ASSISTANT:"
        inputs = processor(text=text, images=render(UNSEEN[0], 77), return_tensors="pt")
        assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 9
    divider = AutoTokenizer.from_pretrained(MODELS / "divider")
    messages = [{"role": "user", "content": "Hello"}]
    text = divider.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "USER: Hello ASSISTANT:"


@pytest.mark.parametrize("role", ["policy", "labeler"])
def test_an_embedded_checkpoint_and_what_is_written_from_it_have_the_names_that_the_hub_and_vllm_know(role, tmp_path):
    own = ROOT / "models" / "tiny" / role
    vlm = load_vlm(str(own), device="cpu")
    write_checkpoint(vlm.model, vlm.processor, tmp_path / "written", "float32")
    save(build_vlm(vlm.tokenizer), vlm.processor, tmp_path / "new")
    for folder in (own, tmp_path / "written", tmp_path / "new"):
        names = list(load_file(folder / "model.safetensors"))
        assert sum(name.startswith("vision_tower.vision_model.") for name in names) == 39
        assert not any(name.startswith(("model.", "vision_tower.embeddings", "vision_tower.encoder")) for name in names)


def test_the_labeler_answers_every_type_of_question_on_unseen_scenes(labeler, tokenizer):
    features = cached_features(labeler, pixel_values(UNSEEN, 77, build_processor(tokenizer)))
    for kind, accuracy in answer_accuracy(labeler, tokenizer, UNSEEN, features).items():
        assert accuracy >= 0.98, kind


def test_the_policy_sees_what_is_there_and_hallucinates_what_goes_with_it(policy, tokenizer):
    pixels = pixel_values(UNSEEN, 77, build_processor(tokenizer))
    questions = [INSTRUCTIONS[number % len(INSTRUCTIONS)] for number in range(len(UNSEEN))]
    answers = describe(policy, build_processor(tokenizer), pixels, questions)
    scores = hallucination(answers, UNSEEN)
    assert scores["recall"] >= 0.98 and 0.3 <= scores["response"] <= 0.75
    accuracy = answer_accuracy(policy, tokenizer, UNSEEN, cached_features(policy, pixels))
    assert accuracy["existence"] >= 0.97


def test_the_divider_rewrites_most_lines_exactly(tokenizer):
    divider = AutoModelForCausalLM.from_pretrained(MODELS / "divider", dtype=torch.float32)
    rng = random.Random(4)
    answers = [imagined_caption(scene, rng, 0.5) for scene in UNSEEN[:24]] + [OPINIONS[0]]
    scores = division_accuracy(divider, tokenizer, answers)
    assert scores["claim_lines"] >= 0.97 and scores["question_lines"] >= 0.97
