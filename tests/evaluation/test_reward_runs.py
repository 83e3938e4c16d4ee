"""What a run of Fact-RLHF learns from and is measured on: the same facts everywhere, and no image on both sides."""

import dataclasses
import json
from pathlib import Path

import pytest

from rlaifv.evaluation import reward_runs
from rlaifv.evaluation.reward_runs import look_and_score, measure, measure_claims, reward_data, table_row
from rlaifv.inference.reward import Rated
from rlaifv.params import RewardRun, load_params
from rlaifv.records import Candidate, Claim, Instruction, Judgement, write_jsonl
from rlaifv.tinyworld.coco import write_world
from rlaifv.tinyworld.language import claims

PARAMS = load_params()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A small world with an iteration: the truth, and answers that name a bus too many, judged without error."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=2, train=30, dev=1, test=1)
    rows = [json.loads(line) for line in (folder / "instructions_train.jsonl").read_text().splitlines()]
    instructions = [Instruction(**row) for row in rows]
    write_jsonl(folder / "train.jsonl", instructions)
    found, made, judged = [], [], []
    for i in instructions:
        texts = [i.reference, f"{i.reference} There is a pink knife, top.", i.reference.split(".")[0] + "."]
        for k, text in enumerate(texts):
            found.append(Candidate(f"{i.id}#{k}", i.id, k, text, len(text.split()), "stop", 0, "m"))
            for n, claim in enumerate(claims(text)):
                right = claim in claims(i.reference)
                made.append(Claim(f"{i.id}#{k}/{n}", f"{i.id}#{k}", claim, "?"))
                judged.append(Judgement(f"{i.id}#{k}/{n}", float(right), float(not right), right, "l"))
    for name, part in (("candidates", found), ("claims", made), ("judgements", judged)):
        write_jsonl(folder / name / f"{name}.jsonl", part)
    return folder


def data(world: Path, taste: float = 0.0, facts: str = "none", **changes):
    settings = dataclasses.replace(
        PARAMS.reward_model, captions=str(world / "captions_train.json"), flipped=0.0, **changes
    )
    run = RewardRun(taste=taste, facts=facts)
    return settings, reward_data(settings, run, world, world, world / "instances_train.json", 1, world / "images")


def test_no_image_is_on_both_sides_and_held_out_labels_are_the_truth(world):
    _, found = data(world, taste=5.0)
    learned, held = {p.image_path for p in found.learn}, {p.image_path for p in found.held}
    assert learned and held and not learned & held
    assert held <= {item.instruction.image_path for item in found.asked}
    _, truth = data(world)
    assert truth.agreement == 1 and found.held == truth.held, "whatever the taste of those who are learned from"
    assert found.agreement < 0.5 and found.learn != truth.learn


@pytest.mark.parametrize("source", ["captions", "accepted"])
def test_pairs_and_single_answers_of_an_image_meet_facts_in_the_same_order(world, source):
    settings, found = data(world, facts=source)
    captions = json.loads((world / "captions_train.json").read_text())["annotations"]
    known = {row["caption"] for row in captions} | {c for row in captions for c in claims(row["caption"])}
    for p in [*found.learn, *found.held]:
        assert 1 <= len(p.facts) <= settings.facts and set(p.facts) <= known
    if source == "captions":
        of_image = {item.instruction.image_path: item.facts for item in found.asked}
        assert all(facts == p.facts for p in found.held for facts in of_image[p.image_path])


def test_scores_are_asked_together_and_come_back_in_their_places(world, monkeypatch):
    calls = []

    def lengths(model, rated):
        calls.append([len(item.answers) for item in rated])
        return [[float(len(answer)) for answer in item.answers] for item in rated]

    monkeypatch.setattr(reward_runs, "score", lengths)
    one, two = sorted(path.name for path in (world / "images").iterdir())[:2]
    rated = [
        (one, Rated(None, "a?", ["x", "yyy"])),
        (two, Rated(None, "a?", ["zz"])),
        (one, Rated(None, ["a?"], ["w" * 5])),
    ]
    assert look_and_score(None, rated, world / "images", 9) == [[1.0, 3.0], [2.0], [5.0]]
    assert calls == [[3, 1]]


def test_a_model_that_sees_no_picture_has_no_image_effect_and_one_that_does_has(world, monkeypatch):
    _, found = data(world)
    monkeypatch.setattr(reward_runs, "score", lambda m, rated: [[-float(len(a)) for a in r.answers] for r in rated])
    measured = measure(None, found, world / "images")
    assert measured["image_effect"] == 0 and measured["length_correlation"]["value"] < -0.9
    first = measured["best_of_n"]["error"]["value"]
    assert first == 0, "the shortest answers are true here"
    colors = lambda m, rated: [[float(len(r.image.getcolors(5184)))] * len(r.answers) for r in rated]  # noqa: E731
    monkeypatch.setattr(reward_runs, "score", colors)
    assert measure(None, found, world / "images")["image_effect"] > 0


def test_facts_as_claims_judge_by_what_captions_say(world, monkeypatch):
    settings, found = data(world)
    monkeypatch.setattr(
        reward_runs,
        "fact_claims",
        lambda vlm, texts, p, s: {i: [c for t in ts for c in claims(t)] for i, ts in texts.items()},
    )
    measured = measure_claims(None, found, settings, world, PARAMS.divide, 1)
    assert measured["accuracy"]["value"] == 1 and measured["best_of_n"]["error"]["value"] == 0
    row = table_row({"run": "x", "taste": 0.0, "facts": "claims", "pairs": 0, "agreement": None} | measured)
    assert row["right"][0] == 1 and row["image_effect"] is None
