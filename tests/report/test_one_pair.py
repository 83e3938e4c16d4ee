"""The walk-through's pair is trained as the pipeline trains: the same loss before, and after each step."""

import dataclasses
import math

import pytest
from PIL import Image
from tiny_llava import save_tiny_llava
from training_runs import PARAMS, log_rows

from rlaifv.records import Candidate, Instruction
from rlaifv.report.one_pair import OnePair
from rlaifv.report.render import render
from rlaifv.report.reward_view import FULL_COLOR
from rlaifv.steps.pairs import Pair, write_pairs
from rlaifv.training.job import train
from rlaifv.vlm.loading import load_vlm

STEPS = 3
ONE = dataclasses.replace(
    PARAMS,
    epochs=STEPS,
    batch_size=1,
    micro_batch_size=1,
    checkpoints_per_epoch=1,
    scheduler="constant",
    warmup_ratio=0.0,
)


def answer(number: int, text: str) -> Candidate:
    return Candidate(f"i#{number}", "i", number, text, 5, "stop", 0, "m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-pair")
    save_tiny_llava(folder / "model")
    Image.new("RGB", (60, 40), "red").save(folder / "i.png")
    return folder


@pytest.fixture(scope="module")
def pair() -> Pair:
    asked = Instruction("i", "i.png", "What is in the image?")
    return Pair(asked, answer(0, "a red kite"), answer(1, "a blue dog at the left"), 0, -1)


@pytest.mark.parametrize("changed", [{}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {"lora_r": 4}])
def test_the_losses_are_the_trainers_for_that_pair(folder, pair, changed):
    params = dataclasses.replace(ONE, **changed)
    one = OnePair(load_vlm(str(folder / "model")), pair, folder, params)
    losses = [one.step() for _ in range(STEPS)]
    write_pairs(folder / "pair.parquet", [pair], folder, "one")
    name = "-".join(changed) or "plain"
    result = train(str(folder / "model"), folder / "pair.parquet", params, folder / name / "out", folder / name, seed=0)
    assert losses == pytest.approx([row["loss"] for row in log_rows(result)], rel=1e-5)
    assert len(set(losses)) == STEPS


def test_before_the_first_step_the_loss_is_log_2_and_no_token_differs(folder, pair):
    one = OnePair(load_vlm(str(folder / "model")), pair, folder, ONE)
    assert one.loss().item() == pytest.approx(math.log(2), abs=1e-6)
    assert all(now == before for tokens in one.tokens().values() for _, now, before in tokens)


def test_a_step_makes_the_chosen_answer_likelier_than_the_rejected_and_the_page_shows_it(folder, pair):
    one = OnePair(load_vlm(str(folder / "model")), pair, folder, ONE)
    one.step()
    chosen, rejected = (one.logps() - one.reference[:, 0]).tolist()
    assert chosen > rejected
    tokens = one.tokens()
    assert "".join(text for text, _, _ in tokens["chosen"]).startswith("a red kite")
    assert sum(now for _, now, _ in tokens["chosen"]) == pytest.approx(one.logps()[0].item(), rel=1e-5)
    page = render("one_pair.html", pair=tokens, full_color=FULL_COLOR)
    assert f"{chosen:+.3f}" in page and f"{rejected:+.3f}" in page


def test_a_pair_that_cannot_be_trained_on_says_why(folder, pair):
    with pytest.raises(ValueError, match="cannot be trained on"):
        OnePair(load_vlm(str(folder / "model")), pair, folder, dataclasses.replace(ONE, max_length=4))
