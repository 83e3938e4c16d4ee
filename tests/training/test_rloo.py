"""Reinforcement learning from sampling to checkpoints: our samples in TRL's trainer, rewards, resume, LoRA."""

import csv
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rloo_runs import NONE, PARAMS, TASKS, TRAIN, WEIGHTS, WordJudges, run, save_inputs
from training_runs import digests
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlaifv import ROOT
from rlaifv.inference.roles import load_role
from rlaifv.inference.sampling import Decoding, Generation, Prompt, generate_batch, uniforms
from rlaifv.params import ParamsError, ServerParams, check_params, load_params, read_yaml
from rlaifv.records import Instruction, ModelRecord
from rlaifv.tinyworld.scenes import Group, Scene, render
from rlaifv.training import verdicts
from rlaifv.training.policy import freeze, load_policy
from rlaifv.training.rewards import length, recall
from rlaifv.training.rloo import ClaimTrainer, RlooResult, StepOrder, Watch, cut_at_control_token, readable
from rlaifv.training.verdicts import Judges, Task, load_judges
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import load_model, load_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("rloo"))


@pytest.fixture(scope="module")
def uninterrupted(folder) -> RlooResult:
    return run(folder, "uninterrupted")


def rows(result: RlooResult) -> list[dict[str, str]]:
    with open(result.log) as stream:
        return list(csv.DictReader(stream))


def make_trainer(folder: Path, weights=WEIGHTS, judges=None, **changes) -> ClaimTrainer:
    params = dataclasses.replace(PARAMS, **changes)
    vlm = load_policy(str(folder / "model"), TRAIN)
    freeze(vlm.model, TRAIN)
    images = folder / "images"
    return ClaimTrainer(vlm, TASKS, judges or WordJudges(), weights, params, TRAIN, images, folder / "state", seed=3)


def first_step(trainer: ClaimTrainer) -> dict:
    """What TRL makes of the first step's answers."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def test_a_run_writes_checkpoints_that_load_alone_and_a_row_per_step(folder, uninterrupted):
    assert sorted(p.name for p in (folder / "uninterrupted" / "out").iterdir()) == [
        *(f"checkpoint-{k}" for k in (1, 2, 3)),
        "log.csv",
    ]
    assert (uninterrupted.steps, uninterrupted.answers, uninterrupted.rejects) == (6, 48, [])
    log = rows(uninterrupted)
    assert [int(row["step"]) for row in log] == [1, 2, 3, 4, 5, 6]
    assert abs(float(log[0]["kl"])) < 1e-5 < abs(float(log[-1]["kl"]))  # the policy begins as the reference
    assert all(float(row["stop"]) <= 0 and float(row["claims"]) <= 0 and not row["recall"] for row in log)
    before = load_vlm(str(folder / "model"), device="cpu").model.state_dict()
    after = AutoModelForImageTextToText.from_pretrained(uninterrupted.checkpoints[-1]).state_dict()
    assert AutoProcessor.from_pretrained(uninterrupted.checkpoints[-1]).tokenizer.padding_side == "right"
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and not any("vision_tower" in name for name in moved)


def test_a_run_killed_in_the_middle_goes_on_to_the_same_bytes(folder, uninterrupted):
    killed = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests" / "helpers")!r})
import rloo_runs
from pathlib import Path
from rlaifv.training.rloo import Watch
def die(self, args, state, control, **kwargs):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Watch.on_step_begin = die
rloo_runs.run(Path({str(folder)!r}), "killed")
"""
    process = subprocess.run([sys.executable, "-c", killed], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    (state,) = (folder / "killed" / "scratch").glob("rloo-*/trainer/*")
    assert state.name == "checkpoint-4"  # step 5 is done again: the first of the third pass
    run(folder, "killed")
    assert digests(folder / "killed" / "out") == digests(folder / "uninterrupted" / "out")


def test_answers_are_drawn_from_the_numbers_of_seed_step_instruction_and_sample_alone(folder):
    trainer = make_trainer(folder)
    batch = first_step(trainer)
    vlm = load_vlm(str(folder / "model"), device="cpu")
    assert len(trainer.now) == 2
    for task, answers in zip(trainer.now, trainer.answers, strict=True):
        prompt = Prompt(open_image(folder / "images" / task.image_path), task.question)
        streams = np.stack([uniforms(3, f"0/{task.id}", s, 10) for s in range(4)])
        (alone,) = generate_batch(vlm, [prompt], [streams], Decoding(1.0, 0, 1.0, 10), shared=False)
        assert answers == [cut_at_control_token(vlm, answer) for answer in alone]
    sequences = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    flat = [answer for row in trainer.answers for answer in row]
    assert sequences == [[*a.token_ids, *([a.end_id] if a.finish_reason == "stop" else [])] for a in flat]
    assert {a.finish_reason for a in flat} == {"stop", "length"}


def test_advantages_are_those_of_the_paper_with_unknown_rewards_left_out(folder):
    class SomeUnknown(WordJudges):
        def look(self, task, answer):
            judged = super().look(task, answer)
            return dataclasses.replace(judged, accepted=()) if len(judged.text.split()) % 2 else judged

    trainer = make_trainer(folder, dataclasses.replace(NONE, claims=2.0, stop=1.0), SomeUnknown(), beta=0.0)
    advantages = first_step(trainer)["advantages"].view(2, 4).double()
    claims, stops = (np.array(trainer.rewards[name], float).reshape(2, 4) for name in ("claims", "stop"))
    assert np.isnan(claims).any() and (stops < 0).any()
    known = np.where(np.isnan(claims), np.nanmean(claims, 1, keepdims=True), claims)
    rewards = np.nan_to_num(2 * known) + stops
    expected = rewards - (rewards.sum(1, keepdims=True) - rewards) / 3
    assert np.allclose(advantages, expected, atol=1e-5)


def test_the_policy_learns_to_leave_out_what_is_rejected(folder):
    weights = dataclasses.replace(NONE, claims=1.0)
    changes = {"steps": 10, "prompts": 4, "samples": 8, "micro_batch_size": 32, "learning_rate": 1e-2, "checkpoints": 1}
    log = rows(run(folder, "learns", dataclasses.replace(PARAMS, **changes), weights=weights))
    first, last = (np.mean([float(row["claims"]) for row in part]) for part in (log[:3], log[-3:]))
    assert first < -0.2 and last > first / 3


def test_with_lora_adapters_learn_a_run_goes_on_from_them_and_the_checkpoint_is_a_whole_model(folder, monkeypatch):
    train, params = dataclasses.replace(TRAIN, lora_r=4), dataclasses.replace(PARAMS, steps=2, checkpoints=2)
    whole = run(folder, "lora-whole", params, train=train)
    assert abs(float(rows(whole)[0]["kl"])) < 1e-5  # the reference is the model without its adapter
    before = load_vlm(str(folder / "model"), device="cpu").model.state_dict()
    after = load_vlm(whole.checkpoints[-1], device="cpu").model.state_dict()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("language_model" in name for name in moved)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Watch, "on_step_begin", stop)
        run(folder, "lora-stopped", params, train=train)
    assert run(folder, "lora-stopped", params, train=train).steps == whole.steps
    assert digests(folder / "lora-stopped" / "out") == digests(folder / "lora-whole" / "out")


def test_an_instruction_whose_image_is_missing_is_left_out_by_its_id(folder):
    vlm = load_vlm(str(folder / "model"), device="cpu")
    unasked = [Task("lost", "lost.png", "what is in the image ?", 4.0), Task("silent", "0.png", "what ?", 0.0)]
    usable, rejects = readable(vlm, [TASKS[0], *unasked], folder / "images", room=10)
    assert usable == [TASKS[0]] and [reject.id for reject in rejects] == ["lost", "silent"]
    assert "lost.png" in rejects[0].reason and "no answer" in rejects[1].reason


def test_a_run_has_its_own_number_of_steps_and_rate(folder):
    weights = dataclasses.replace(WEIGHTS, steps=2, learning_rate=7e-4)
    log = rows(run(folder, "own", dataclasses.replace(PARAMS, checkpoints=2), weights=weights))
    assert len(log) == 2 and float(log[0]["learning_rate"]) == pytest.approx(7e-4)


def test_truth_is_logged_beside_the_rewards_and_changes_no_step(folder, uninterrupted):
    params = dataclasses.replace(PARAMS, steps=1, checkpoints=1)
    result = run(folder, "truth", params, truth=lambda path, answer: answer.count("dog") if path != "0.png" else None)
    assert all(0 <= float(row["true_hallucination"]) <= 1 for row in rows(result))
    assert rows(result)[0]["grad_norm"] == rows(uninterrupted)[0]["grad_norm"]


def test_every_pass_has_its_own_order_and_a_run_that_goes_on_keeps_it():
    step = 0
    order = StepOrder(5, PARAMS, repeats=2, seed=3, step=lambda: step)
    first = list(order)
    assert len(first) == len(order) == 2 * 2 * 4 * 2  # steps, instructions, answers, readings
    assert first[:8] == first[8:16] and len(set(first)) == 4 and first[:4] == [first[0]] * 4
    step = 3  # the second step of the second pass: the Trainer skips its first
    second = list(order)
    assert second != first and second == list(StepOrder(5, PARAMS, repeats=2, seed=3, step=lambda: 2))
    with pytest.raises(ValueError, match=r"1 instructions do not fill a step: set rloo\.prompts \(now 2\) lower"):
        StepOrder(1, PARAMS, 1, 3, lambda: 0)


def test_an_answer_is_cut_before_an_image_placeholder_and_counts_as_unfinished(folder):
    vlm = load_vlm(str(folder / "model"), device="cpu")
    image, red, dog = (vlm.tokenizer.convert_tokens_to_ids(word) for word in ("<image>", "red", "dog"))
    cut = cut_at_control_token(vlm, Generation("red <image> dog", [red, image, dog], "stop", 2))
    assert (cut.text, cut.token_ids, cut.finish_reason, cut.end_id) == ("red", [red], "length", None)
    kept = Generation("red dog", [red, dog], "stop", 2)
    assert cut_at_control_token(vlm, kept) is kept


def test_the_judges_say_of_the_shipped_world_what_is_true_in_it(tmp_path):
    params = load_params("params.yaml")
    scene = Scene(1, "kitchen", (Group("cup", "red", 1, 0), Group("fork", "blue", 2, 4)))
    render(scene, 7).save(tmp_path / "1.png")

    def record(role: str) -> ModelRecord:
        path = getattr(params, role).path
        return ModelRecord(path, None, "float32", "cpu", load_vlm(path, device="cpu").fingerprint)

    judges = Judges(
        load_model(record("divider")),
        load_role(record("labeler"), ServerParams()),
        params.divide,
        params.feedback.suffix,
        params.seed,
        tmp_path,
        lambda prompts: [[float(len(answer)) for answer in answers] for _, _, answers, _ in prompts],
    )
    true = "There is a red cup at the top-left of the picture. There are two blue forks at the center of the picture."
    false = "There is a red cup at the top-left of the picture. There is a brown chair at the center of the picture."
    task = Task("one", "1.png", "Describe the image.", 20.0, facts=(true,))
    said = [Generation(text, [5] * 20, "stop", 2) for text in (true, false, "It is a lovely picture.")]
    ((right, wrong, empty),) = judges.judge([task], [said])
    assert all(right.accepted) and len(right.accepted) == 6 and recall(right) == 1.0
    assert wrong.accepted.count(False) >= 1 and wrong.accepted[:3] == (True, True, True) and recall(wrong) == 0.5
    assert empty.claims == () and empty.accepted == () and recall(empty) == 0.0
    assert (right.score, right.tokens, right.finished) == (len(true), 20, True)


def test_only_the_judges_that_a_reward_counts_are_loaded_and_asked(tmp_path):
    params = load_params("params.yaml")
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    missing = ModelRecord("no/such/model", None, "float32", "cpu", "0")
    settings = (ServerParams(), params.divide, params.feedback.suffix, params.seed, tmp_path)
    weights = params.rloo_runs["plain"]
    judges = load_judges(missing, missing, weights, *settings)
    task = Task("one", "1.png", "Describe the image.", 20.0, facts=("There is a cup.",))
    ((answer,),) = judges.judge([task], [[Generation("There is a cup.", [5] * 20, "stop", 2)]])
    assert answer.claims is None and answer.accepted == () and answer.facts is None and length(answer) == 0.0
    for name in ("claims", "recall"):
        with pytest.raises(FileNotFoundError, match="no/such/model"):
            load_judges(missing, missing, dataclasses.replace(weights, **{name: 1.0}), *settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": 5}, r"rloo\.micro_batch_size 5 does not divide prompts x samples = 64"),
        ({"checkpoints": 63}, r"rloo\.checkpoints 63 are more than its 62 steps"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(change, message):
    content = read_yaml(ROOT / "params.yaml")
    content["rloo"] |= change
    with pytest.raises(ParamsError, match=message):
        check_params(content, "params.yaml")


@pytest.mark.parametrize("changed", [{"scored_by": None}, {"scored_by": "nobody"}, {"reward_model": 0.0}])
def test_a_run_against_a_reward_model_says_which_and_no_other_run_does(changed):
    content = read_yaml(ROOT / "params.yaml")
    content["rloo_runs"]["plain"] |= changed
    with pytest.raises(ParamsError, match=r"rloo_runs\.plain\.scored_by: a weight of reward_model needs one"):
        check_params(content, "params.yaml")


def test_a_run_may_be_scored_by_the_folder_of_a_reward_model():
    content = read_yaml(ROOT / "params.yaml")
    content["rloo_runs"]["plain"] |= {"scored_by": "data/checkpoints/rm"}
    scored_by = check_params(content, "params.yaml").rloo_runs["plain"].scored_by
    assert verdicts.reward_model_folder(scored_by) == ROOT / "data" / "checkpoints" / "rm"
    assert verdicts.reward_model_folder("plain") == ROOT / "data" / "reward_models" / "plain" / "model"
    assert verdicts.reward_model_folder(None) is None


def test_the_questions_of_a_step_share_their_images_across_instructions(monkeypatch):
    asked = []

    def judge(_, items):
        asked.extend(items)
        return [[(1.0, 0.0) if "true" in question else (0.0, 1.0) for question in questions] for _, questions in items]

    monkeypatch.setattr(verdicts, "look", lambda labeler, path: path.name)
    monkeypatch.setattr(verdicts, "judge_fit", judge)
    judges = Judges(None, object(), None, "yes?", 0, Path("images"))
    tasks = [Task(name, image, "what ?", 4.0) for name, image in (("a", "1"), ("b", "2"), ("c", "1"))]
    said = [["true q", "p"], ["true q"], ["true q", "r"]]
    divisions = [[SimpleNamespace(questions=[question]) for question in row] for row in said]
    found = judges._ask_labeler(tasks, divisions)
    assert asked == [("1", ["true q yes?", "p yes?", "r yes?"]), ("2", ["true q yes?"])], (
        "an image once, a question once"
    )
    assert [[row[q] for q in questions] for row, questions in zip(found, said, strict=True)] == [
        [True, False],
        [True],
        [True, False],
    ]


def test_captions_of_an_image_are_facts_in_place_of_the_reference():
    told = [
        Instruction("a", "x/1.png", "what ?", "A red cup is there.", ""),
        Instruction("b", "2.png", "is it ?", "no", ""),
    ]
    captions = {"1.png": ["A cup.", "Tea."]}
    assert [task.facts for task in verdicts.make_tasks(told, [], captions)] == [("A cup.", "Tea."), ()]
    assert verdicts.make_tasks(told, [])[0].facts == ("A red cup is there.",)
    assert verdicts.make_tasks(told, [], captions)[1].gold == "no"


def test_without_facts_an_instruction_is_left_out_where_the_reward_model_reads_them(folder):
    vlm = load_vlm(str(folder / "model"), device="cpu")
    known = dataclasses.replace(TASKS[1], facts=("A cup.",))
    usable, (reject,) = readable(vlm, [TASKS[0], known], folder / "images", room=10, needs_facts=True)
    assert usable == [known] and reject.id == TASKS[0].id and "rloo.captions" in reject.reason


def test_a_reward_model_reads_facts_only_where_it_was_trained_with_them(monkeypatch):
    asked = []
    monkeypatch.setattr(verdicts, "score", lambda model, rated: asked.append(rated) or [[1.0]])
    prompts = [("image", "what ?", ["a cup"], ("There is a cup.",))]
    for facts in (True, False):
        model = SimpleNamespace(format=SimpleNamespace(facts=facts))
        assert verdicts.scorer(model)(prompts) == [[1.0]]
    assert [rated[0].facts for rated in asked] == [["There is a cup."], None]
