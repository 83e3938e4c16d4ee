"""The tiny checkpoints in the released layouts give, once converted, what the original code gave for them."""

import csv
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rloo_runs import NONE, PARAMS, TRAIN
from safetensors.torch import load_file, save_file

from rlaifv.convert.__main__ import main
from rlaifv.inference.logprobs import continuation_logprobs
from rlaifv.inference.reward import Rated, score, score_rows
from rlaifv.steps.divide import Division
from rlaifv.training.rloo import train_rloo
from rlaifv.training.verdicts import Judges, Task, reward_model_folder
from rlaifv.training.verdicts import scorer as scorer_of
from rlaifv.vlm.chat_format import EncodedPrompt, common_length, encode, prompt_text
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM, load_vlm
from rlaifv.vlm.reward_format import load_reward_model, reward_text

CLOSE = 1e-4


@pytest.fixture(scope="module")
def golden(shared) -> Path:
    if not (shared / "golden_models").is_dir():
        pytest.skip(f"{shared / 'golden_models'} is absent: the golden cases are not part of the repository")
    return shared / "golden_models"


def expected(golden: Path, name: str) -> dict:
    return json.loads((golden / name / "expected.json").read_text())


def converted(source: Path, out: Path, *options: str) -> Path:
    main([str(source), str(out), *options])
    return out


def load(folder: Path, **settings) -> VLM:
    return load_vlm(str(folder), dtype="float32", device="cpu", settings=settings)


def with_placeholders(ids: list[int]) -> list[int]:
    """Token ids with the 576 places of the image, whose token is 0, where the original has one −200."""
    return [j for i in ids for j in ([0] * 576 if i == -200 else [i])]


def pixels(vlm: VLM, values: torch.Tensor) -> bytes:
    """Normalised pixel values [3, side, side] as the uint8 picture [side, side, 3] that they were made of."""
    looks = vlm.processor.image_processor
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (looks.image_mean, looks.image_std))
    exact = (values.double() * std + mean) * 255
    assert (exact - exact.round()).abs().max() < 1e-3
    return exact.round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes()


def check_case(vlm: VLM, case: dict, photo: Path) -> None:
    """Tokens, pixels, logits of the last position, greedy and beam answers of one picture and question."""
    encoded = encode(vlm, open_image(photo / case["image"]), case["question"])
    assert encoded.prompt_ids == with_placeholders(case["input_ids"])
    values = encoded.inputs["pixel_values"]
    assert hashlib.sha256(pixels(vlm, values[0])).hexdigest() == case["pixel_uint8_sha256"]
    ids = torch.tensor([encoded.prompt_ids])
    with torch.inference_mode():
        logits = vlm.model(input_ids=ids, pixel_values=values).logits[0, -1]
        last = case["last_position"]
        assert len(logits) == case["logits_shape"][-1], "no word is added to the vocabulary"
        np.testing.assert_allclose(logits[:32], last["first_32"], atol=CLOSE)
        assert logits.logsumexp(0).item() == pytest.approx(last["logsumexp"], abs=CLOSE)
        for beams, name in ((1, "greedy_ids"), (3, "beam3_ids")):
            if name in case:
                told = {"num_beams": beams, "do_sample": False, "max_new_tokens": 8, "attention_mask": ids * 0 + 1}
                found = vlm.model.generate(input_ids=ids, pixel_values=values, **told)
                assert found[0, ids.shape[1] :].tolist() == case[name]


@pytest.fixture(scope="module")
def llava(golden, tmp_path_factory) -> Path:
    return converted(golden / "llava_original" / "checkpoint", tmp_path_factory.mktemp("golden") / "llava")


def test_rlaifv_7b_answers_as_the_original_does(golden, llava, shared):
    vlm = load(llava)
    for case in expected(golden, "llava_original")["cases"]:
        check_case(vlm, case, shared / "real" / "examples")


def test_a_second_turn_is_read_as_the_original_reads_it(golden, llava, tmp_path):
    turns = expected(golden, "llava_original")["two_turns"]
    asked = [part.strip() for part in turns["prompt"].split("<image>\n")[1].split("ASSISTANT:")]
    first, (answer, second) = asked[0], asked[1].split("</s>USER:")
    source = copy_of(golden, tmp_path, legacy=True)
    for folder, name in ((llava, "legacy_false"), (converted(source, tmp_path / "out"), "legacy_true")):
        vlm = load(folder)
        text = prompt_text(vlm, [first, answer.strip(), second.strip()])
        assert vlm.tokenizer(text)["input_ids"] == [max(i, 0) for i in turns[f"input_ids_{name}"]]


def test_the_log_probs_of_training_are_the_originals(golden, llava, shared):
    vlm = load(llava, processor={"do_pad": False})  # the original's training cuts pictures, its chat pads them
    for case in expected(golden, "llava_original")["training_logps"]:
        image = open_image(shared / "real" / "examples" / case["image"])
        encoded = encode(vlm, image, case["question"], [case[side]["answer"] for side in ("chosen", "rejected")])
        assert hashlib.sha256(pixels(vlm, encoded.inputs["pixel_values"][0])).hexdigest() == case["pixel_uint8_sha256"]
        (logps,) = continuation_logprobs(vlm, [encoded])
        for row, found, side in zip(encoded.rows, logps, ("chosen", "rejected"), strict=True):
            assert row == with_placeholders(case[side]["input_ids"])
            np.testing.assert_allclose(found, case[side]["per_token_logp"], atol=CLOSE)
            assert sum(found) == pytest.approx(case[side]["sum_logp"], abs=CLOSE)


def copy_of(golden: Path, folder: Path, drop_tower: bool = False, pickled: bool = False, legacy: bool = False) -> Path:
    """The golden LLaVA changed: without its image encoder, as .bin, with another token setting."""
    out = folder / "checkpoint"
    shutil.copytree(golden / "llava_original" / "checkpoint", out, copy_function=shutil.copyfile)
    shutil.copytree(golden / "llava_original" / "clip_tower", folder / "clip_tower", copy_function=shutil.copyfile)
    out.chmod(0o755)
    weights = load_file(out / "model.safetensors")
    if drop_tower:
        weights = {name: weight for name, weight in weights.items() if "vision_tower" not in name}
        config = json.loads((out / "config.json").read_text()) | {"model_type": "llava"}
        (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, out / "pytorch_model.bin")
    else:
        save_file(weights, out / "model.safetensors")
    settings = json.loads((out / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out


def test_the_layout_of_llava_v1_5_answers_the_same(golden, shared, tmp_path):
    vlm = load(converted(copy_of(golden, tmp_path, drop_tower=True, pickled=True, legacy=True), tmp_path / "out"))
    check_case(vlm, expected(golden, "llava_original")["cases"][0], shared / "real" / "examples")


@pytest.mark.parametrize("part", ["sft", "policy"])
def test_llava_rlhf_answers_as_the_original_does(golden, shared, tmp_path, part):
    vlm = load(converted(golden / "llava_rlhf", tmp_path / "out", "--part", part))
    for case in expected(golden, "llava_rlhf")[part]:
        check_case(vlm, case, shared / "real" / "examples")


def test_the_reward_model_gives_the_originals_rewards(golden, shared, tmp_path):
    (tmp_path / "prompt.txt").write_text("USER: Is it good? ASSISTANT: It is\n")
    source = golden / "llava_rlhf" / "rm_lora_adapter_model"
    folder = converted(source, tmp_path / "rm", "--prompt", str(tmp_path / "prompt.txt"))
    model = load_reward_model(str(folder), dtype="float32", device="cpu")
    cases = expected(golden, "llava_rlhf")["rewards"]
    begin = encode(model.vlm, open_image(shared / "real" / "examples" / cases[0]["image"]), cases[0]["question"])
    for image in {case["image"] for case in cases}:
        asked = [case for case in cases if case["image"] == image]
        inputs = encode(model.vlm, open_image(shared / "real" / "examples" / image), "What?").inputs
        rows = [with_placeholders(case["input_ids"]) for case in asked]
        common = min(common_length(rows[0], row) for row in rows)
        encoded = EncodedPrompt(rows[0][:common], rows, [len(row) for row in rows], inputs)
        assert score_rows(model, [encoded])[0] == pytest.approx([case["reward"] for case in asked], abs=CLOSE)
    assert begin.prompt_ids == with_placeholders(cases[0]["input_ids"])[: len(begin.prompt_ids)]


def test_the_released_reward_model_is_the_reward_of_a_run(golden, shared, tmp_path):
    (tmp_path / "prompt.txt").write_text("USER: Is it good, given {factual_prompt}? ASSISTANT: It is\n")
    (tmp_path / "facts.txt").write_text("these facts:")
    told = ["--prompt", str(tmp_path / "prompt.txt"), "--facts", str(tmp_path / "facts.txt")]
    scorer = converted(golden / "llava_rlhf" / "rm_lora_adapter_model", tmp_path / "rm", *told)
    policy = converted(golden / "llava_rlhf", tmp_path / "policy", "--part", "policy")
    images = shared / "real" / "examples"
    names = list(dict.fromkeys(case["image"] for case in expected(golden, "llava_rlhf")["rewards"]))
    tasks = [Task(name, name, "What?", 4.0, facts=("A photo.",)) for name in names]
    weights = dataclasses.replace(NONE, reward_model=1.0, scored_by=str(scorer))
    seen = []

    def load() -> Judges:
        model = load_reward_model(str(reward_model_folder(weights.scored_by)), device="cpu")
        ask = scorer_of(model)

        def score(prompts):
            seen.extend(zip(prompts, found := ask(prompts), strict=True))
            return found

        judges = Judges(None, None, None, "", 0, images, score, needs_facts=model.format.facts)
        judges._divide = lambda tasks, texts: [[Division([], [])] * len(row) for row in texts]
        judges._ask_labeler = lambda tasks, divisions: [{} for _ in tasks]
        judges.facts = {task.id: () for task in tasks}
        return judges

    params = dataclasses.replace(PARAMS, steps=1, prompts=len(names), samples=2, checkpoints=1, max_new_tokens=4)
    params = dataclasses.replace(params, micro_batch_size=2)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    result = train_rloo(str(policy), tasks, load, {}, weights, params, TRAIN, images, out, scratch, seed=3)
    with open(result.log) as stream:
        (row,) = csv.DictReader(stream)
    rewards = [reward for _, rewards in seen for reward in rewards]
    assert float(row["reward_model"]) == pytest.approx(np.mean(rewards), abs=CLOSE) and len(set(rewards)) > 1
    model = load_reward_model(str(scorer), device="cpu")
    (image, question, answers, facts), given = seen[0]
    text = reward_text(model.vlm, model.format, question, answers[0], list(facts), image=True)
    assert "these facts:\n  - A photo.\n" in text
    (alone,) = score(model, [Rated(image, question, answers[:1], list(facts))], shared=False)
    assert alone[0] == pytest.approx(given[0], abs=CLOSE)


def test_the_way_back_gives_the_released_tensors(golden, llava, tmp_path):
    sft = converted(golden / "llava_rlhf" / "sft_model", tmp_path / "sft")
    for folder, source in ((llava, "llava_original/checkpoint"), (sft, "llava_rlhf/sft_model")):
        back = converted(folder, tmp_path / f"back-{folder.name}", "--to", "original")
        was, now = (load_file(place / "model.safetensors") for place in (golden / source, back))
        assert was.keys() == now.keys()
        assert all(was[name].dtype == now[name].dtype and torch.equal(was[name], now[name]) for name in was)
        for file in (golden / source).glob("*.json"):
            assert json.loads((back / file.name).read_text()) == json.loads(file.read_text())
        assert (back / "tokenizer.model").read_bytes() == (golden / source / "tokenizer.model").read_bytes()
