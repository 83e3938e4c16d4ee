"""A reward model from preferences: its loss, its rows, its run from the file to a checkpoint that scores."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llava import WORDS, answer, picture, save_tiny_llava
from training_runs import digests

from rlaifv import ROOT
from rlaifv.inference.reward import Rated, score
from rlaifv.inference.yes_no import yes_no_ids
from rlaifv.params import RewardModelParams, TrainParams, load_params
from rlaifv.records import write_jsonl
from rlaifv.steps.preferences import Preference
from rlaifv.training import reward_model
from rlaifv.training.dpo import PairCollator
from rlaifv.training.job import TrainResult
from rlaifv.training.packed_pairs import ImageInputs
from rlaifv.training.pair_data import PairData
from rlaifv.training.policy import freeze
from rlaifv.training.reward_model import (
    RewardScorer,
    answer_rewards,
    preference_loss,
    start_head,
    train_reward_model,
    write_preferences,
)
from rlaifv.vlm.images import decode_image
from rlaifv.vlm.loading import load_vlm
from rlaifv.vlm.reward_format import RewardFormat, RewardHead, encode_answers, load_reward_model

TRAIN = TrainParams(dtype="float32")
REWARD: RewardModelParams = dataclasses.replace(
    load_params().reward_model,
    learning_rate=1e-3,
    epochs=2,
    batch_size=4,
    micro_batch_size=2,
    checkpoints_per_epoch=2,
    head="random",
    fact_line=" - {}",
)
PROMPT = " USER : right ? {factual_prompt} ASSISTANT :"
FORM = RewardFormat(PROMPT, REWARD.facts_intro, REWARD.fact_line, "base", "random")


def preferences(n: int = 13) -> list[Preference]:
    rng = np.random.default_rng(0)
    return [
        Preference(
            id=f"p{i}",
            image_path=f"{i // 2}.png",
            conversation=["what is in the image ?"] if i % 3 else ["is it a dog ?", "no", "describe it ."],
            chosen=answer(rng, rng.integers(3, 9)),
            rejected=answer(rng, rng.integers(3, 9)),
            facts=[" ".join(rng.choice(WORDS, 3)), "a red kite"],
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    save_tiny_llava(folder / "model")
    (folder / "images").mkdir()
    for i in range(7):
        (folder / "images" / f"{i}.png").write_bytes(picture(i))
    write_jsonl(folder / "learn.jsonl", preferences())
    return folder


def run(folder: Path, name: str, reward: RewardModelParams = REWARD, file: str = "learn.jsonl") -> TrainResult:
    places = folder / "model", folder / file, folder / "images"
    out, scratch = folder / name / "out", folder / name / "scratch"
    return train_reward_model(str(places[0]), *places[1:], PROMPT, reward, TRAIN, out, scratch, seed=3)


@pytest.fixture(scope="module")
def trained(folder) -> TrainResult:
    return run(folder, "trained")


def test_the_loss_of_four_numbers_is_that_of_its_equation():
    rewards = torch.tensor([[2.0, -1.0], [0.5, 1.0]])
    by_hand = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(2.0))) / 2 + 1e-3 * abs((2.5 + 0.0) / 2)
    assert float(preference_loss(rewards, 1e-3)) == pytest.approx(by_hand, abs=1e-6)
    assert float(preference_loss(-rewards.flip(0), 1e-3)) == pytest.approx(by_hand, abs=1e-6), "the pull has no side"


@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradients_are_those_of_two_plain_rows(folder, tmp_path, packed):
    vlm, pairs = load_vlm(str(folder / "model"), device="cpu"), preferences()[:3]

    def write(vlm, path, limit, out):
        write_preferences(vlm, path, limit, out, FORM, folder / "images")

    data = PairData(vlm, folder / "learn.jsonl", None, tmp_path / "pairs", write)
    head = RewardHead(32)
    freeze(vlm.model, TRAIN)
    scorer = RewardScorer(vlm.model, head, ImageInputs(data))
    batch = PairCollator(data, vlm.tokenizer.pad_token_id, packed=packed)(list(range(3)))
    loss = preference_loss(answer_rewards(scorer(batch)), 1e-3)
    loss.backward()
    found = {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}
    scorer.zero_grad()

    plain = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            image = decode_image((folder / "images" / pair.image_path).read_bytes(), "")
            (text,) = [getattr(pair, side)]
            coded = encode_answers(vlm, FORM, image, pair.conversation, [text], pair.facts)
            out = vlm.model.model(input_ids=torch.tensor(coded.rows), **coded.inputs)
            plain.append(head(out.last_hidden_state[0, -1])[0])
    plain_loss = preference_loss(torch.stack(plain).view(2, -1), 1e-3)
    plain_loss.backward()
    assert float(loss) == pytest.approx(float(plain_loss), abs=1e-5)
    expected = {name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and "reward_head.weight" in found
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


def test_a_run_ends_in_reward_models_that_prefer_what_was_preferred(folder, trained):
    assert len(trained.checkpoints) == 4 and trained.steps == 6 and trained.layout == "packed, features kept"
    first, last = (load_reward_model(path) for path in (trained.checkpoints[0], trained.checkpoints[-1]))
    assert last.format.prompt == PROMPT and last.format.base == load_vlm(str(folder / "model")).fingerprint
    right = []
    for model in (first, last):
        rated = [
            Rated(
                decode_image((folder / "images" / p.image_path).read_bytes(), ""),
                p.conversation,
                [p.chosen, p.rejected],
                p.facts,
            )
            for p in preferences()
        ]
        right.append(sum(chosen > rejected for chosen, rejected in score(model, rated)))
    assert right[1] >= 12 > right[0]


def test_the_same_run_writes_the_same_bytes_also_when_it_was_killed_on_the_way(folder, trained):
    killed = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT / "tests" / "helpers")!r}, {str(ROOT / "tests" / "training")!r}]
import test_reward_model
from pathlib import Path
from rlaifv.training.dpo import Progress
def die(self, args, state, control, **kwargs):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Progress.on_step_begin = die
test_reward_model.run(Path({str(folder)!r}), "killed")
"""
    process = subprocess.run([sys.executable, "-c", killed], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    (left,) = (folder / "killed" / "scratch").glob("reward_model-*/trainer/*")
    assert left.name == "checkpoint-4"
    run(folder, "killed")
    assert digests(folder / "killed" / "out") == digests(folder / "trained" / "out")


def test_lora_is_merged_and_keeps_the_vector(folder):
    result = run(folder, "lora", dataclasses.replace(REWARD, lora_r=4, epochs=1, learning_rate=1e-2))
    model = load_reward_model(result.checkpoints[-1])
    base = load_vlm(str(folder / "model")).model.state_dict()
    moved = {name for name, weight in model.vlm.model.state_dict().items() if not weight.equal(base[name])}
    assert moved and all("language_model" in name and "proj" in name for name in moved)
    start = start_head(model.vlm, "random", 3)
    assert not torch.equal(model.head.weight, start.weight) and torch.allclose(
        model.head.weight, start.weight, atol=0.1
    )


def test_a_loss_that_is_not_finite_stops_with_the_preferences_and_the_way_out(folder, monkeypatch):
    monkeypatch.setattr(reward_model, "preference_loss", lambda rewards, regularizer: rewards.sum() * torch.nan)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1, pairs p\d+.*reward_model\.learning_rate"):
        run(folder, "nan")


def test_preferences_that_cannot_be_used_are_rejected_by_id(folder):
    rows = preferences(8)
    rows[1] = dataclasses.replace(rows[1], chosen="dog </s> cat")
    rows[2] = dataclasses.replace(rows[2], rejected="dog " * 300)
    rows[3] = dataclasses.replace(rows[3], image_path="absent.png")
    rows[4] = dataclasses.replace(rows[4], facts=[])
    write_jsonl(folder / "bad.jsonl", rows)
    reasons = dict(run(folder, "bad", dataclasses.replace(REWARD, epochs=1), "bad.jsonl").rejects)
    assert set(reasons) == {"p1", "p2", "p3", "p4"}
    assert "'</s>'" in reasons["p1"] and "context holds 256" in reasons["p2"]
    assert "absent.png" in reasons["p3"] and "there are none: give them" in reasons["p4"]


def test_a_vector_begins_as_the_output_layers_yes_less_its_no_or_as_noise_of_the_seed():
    vlm = load_vlm(str(ROOT / "models" / "tiny" / "policy"), device="cpu")
    ids, hidden = yes_no_ids(vlm), torch.randn(128)
    logits = vlm.model.get_output_embeddings()(hidden)
    expected = logits[list(ids.yes)].mean() - logits[list(ids.no)].mean()
    assert float(start_head(vlm, "yes_no", 0)(hidden)) == pytest.approx(float(expected), abs=1e-4)
    assert start_head(vlm, "random", 1).weight.equal(start_head(vlm, "random", 1).weight)
    assert not start_head(vlm, "random", 1).weight.equal(start_head(vlm, "random", 2).weight)


def test_reward_json_says_what_the_model_was_made_of(trained):
    content = json.loads((Path(trained.checkpoints[-1]) / "reward.json").read_text())
    assert content["head"] == "random" and content["fact_line"] == " - {}" and len(content["example"]) > 10
