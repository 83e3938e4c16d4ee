"""A sample depends on (seed, instruction, sample number) alone, and nothing is lost."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tiny_llava import save_tiny_llava

from rlaifv.inference.sampling import uniforms
from rlaifv.inference.served import Sampled
from rlaifv.params import load_params
from rlaifv.records import Instruction, read_jsonl
from rlaifv.steps import generate as generate_module
from rlaifv.steps.generate import generate
from rlaifv.store import Store
from rlaifv.vlm.loading import load_vlm

PARAMS = dataclasses.replace(load_params().generate, samples=3, max_new_tokens=8, max_reject_rate=1.0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_vlm(str(save_tiny_llava(tmp_path_factory.mktemp("policy"))))


@pytest.fixture
def instructions(tmp_path):
    for name, size in (("a.png", (24, 24)), ("b.png", (60, 30))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / name)
    questions = ("what is in the image ?", "describe it", "is there a dog and a cat ?")
    return [Instruction(str(i), "ab"[i % 2] + ".png", q) for i, q in enumerate(questions)]


def answers(policy, instructions, folder, seed=1, **changes):
    store = Store("generate", {}, folder / f"scratch-{len(list(folder.iterdir()))}")
    out = folder / "out" / "candidates.jsonl"
    counts = generate(lambda: policy, instructions, folder, dataclasses.replace(PARAMS, **changes), seed, store, out)
    rejects = read_jsonl(out.parent / "rejects.jsonl")
    assert counts == (len(read_jsonl(out)), len(rejects))
    return {row["id"]: row["answer"] for row in read_jsonl(out)}, rejects


def test_results_depend_neither_on_batch_size_nor_on_order_nor_on_the_others(policy, instructions, tmp_path):
    together, _ = answers(policy, instructions, tmp_path, batch_size=3)
    alone, _ = answers(policy, instructions, tmp_path, batch_size=1)
    reversed_, _ = answers(policy, instructions[::-1], tmp_path, batch_size=2)
    one, _ = answers(policy, instructions[1:2], tmp_path, batch_size=1)
    assert together == alone == reversed_
    assert one == {key: value for key, value in together.items() if key.startswith("1#")}


def test_another_seed_gives_other_samples(policy, instructions, tmp_path):
    assert answers(policy, instructions, tmp_path)[0] != answers(policy, instructions, tmp_path, seed=2)[0]


def test_more_samples_leave_the_first_ones_as_they_were(policy, instructions, tmp_path):
    few, _ = answers(policy, instructions, tmp_path)
    many, _ = answers(policy, instructions, tmp_path, samples=5)
    assert few.items() <= many.items() and len(many) > len(few)


def test_a_missing_image_rejects_its_samples_and_the_run_goes_on(policy, instructions, tmp_path):
    broken = dataclasses.replace(instructions[0], image_path="gone.png")
    kept, rejects = answers(policy, [broken, *instructions[1:]], tmp_path)
    assert {key[0] for key in kept} <= {"1", "2"}
    assert sum("gone.png does not exist" in reject["reason"] for reject in rejects) == PARAMS.samples


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("what <image> is it ?", "holds '<image>', which"),
        ("</s> describe it", "holds '</s>', which"),
        ("dog " * 244, "prompt, image and the 8 of an answer are 2"),
        ("dog " * 9000, "is 9000 tokens, the context holds"),
    ],
    ids=["image", "end", "no room", "endless"],
)
def test_a_question_that_the_policy_cannot_be_asked_rejects_its_samples_and_no_others(
    policy, instructions, tmp_path, question, reason
):
    hostile = dataclasses.replace(instructions[0], question=question)
    kept, rejects = answers(policy, [hostile, *instructions[1:]], tmp_path)
    others, _ = answers(policy, instructions[1:], tmp_path)
    assert kept == others
    assert sum(reason in reject["reason"] for reject in rejects) == PARAMS.samples


def test_an_answer_that_spells_a_special_token_is_rejected(policy, instructions, tmp_path, monkeypatch):
    spelled = Sampled("a dog </s> <image>", 2, "stop")
    monkeypatch.setattr(generate_module, "draw_answers", lambda _, asked, *rest: [[spelled] * 3 for _ in asked])
    kept, rejects = answers(policy, instructions, tmp_path)
    assert not kept and len(rejects) == 9 and "holds '</s>'" in rejects[0]["reason"]


def test_the_random_numbers_of_a_sample_are_its_own():
    streams = [uniforms(1, name, sample, 5) for name in ("a", "b") for sample in (0, 1)]
    assert len({tuple(stream) for stream in streams}) == 4
    assert np.array_equal(uniforms(1, "a", 0, 5), uniforms(1, "a", 0, 9)[:5])
