"""A training run from pairs to checkpoints: resume, determinism, rejects, warnings, LoRA, several processes."""

import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_llava import picture, save_pairs
from training_runs import PARAMS, digests, folder, log_rows, run
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlaifv import ROOT
from rlaifv.params import TrainParams
from rlaifv.steps.public_pairs import parquet_files
from rlaifv.training import job
from rlaifv.training.dpo import EpochOrder, Watch, write_log
from rlaifv.training.job import TrainResult, launch, train
from rlaifv.training.pair_data import PairData
from rlaifv.training.reference import ReferenceStore
from rlaifv.vlm.loading import load_vlm

__all__ = ["folder"]  # a fixture: pytest finds it by its name in this module


@pytest.fixture(scope="module")
def uninterrupted(folder) -> TrainResult:
    return run(folder, "uninterrupted")


def test_a_run_writes_a_checkpoint_every_part_of_an_epoch_and_a_row_per_step(folder, uninterrupted):
    out = folder / "uninterrupted" / "out"
    assert sorted(p.name for p in out.iterdir()) == [*(f"checkpoint-{k}" for k in (1, 2, 3, 4)), "log.csv"]
    rows = log_rows(uninterrupted)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # 13 pairs are 3 batches of 4 an epoch
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # the policy is the reference: log 2
    assert rows[-1]["rewards_margins"] > 0.05
    assert list((folder / "uninterrupted" / "scratch" / "tensorboard").rglob("events.*")), "stays when the run is done"
    assert uninterrupted.pairs_per_second > 0 and uninterrupted.tokens_per_second > uninterrupted.pairs_per_second
    assert uninterrupted.reference == "computed" and uninterrupted.layout == "packed, features kept"


def test_a_checkpoint_loads_alone_and_only_the_language_model_and_projector_moved(folder, uninterrupted):
    before = load_vlm(str(folder / "model"), device="cpu").model.state_dict()
    after = AutoModelForImageTextToText.from_pretrained(uninterrupted.checkpoints[-1]).state_dict()
    AutoProcessor.from_pretrained(uninterrupted.checkpoints[-1])
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and not any("vision_tower" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved) and any("lm_head" in name for name in moved)


def test_the_same_run_writes_the_same_bytes_and_another_seed_others(folder, uninterrupted):
    again = run(folder, "again")
    assert digests(folder / "again" / "out") == digests(folder / "uninterrupted" / "out")
    train(
        str(folder / "model"), folder / "pairs.parquet", PARAMS, folder / "seed", folder / "again" / "scratch", seed=4
    )
    assert (
        digests(folder / "seed")["checkpoint-4/model.safetensors"]
        != digests(Path(again.checkpoints[-1]).parent)["checkpoint-4/model.safetensors"]
    )


@pytest.mark.parametrize(("resume_every", "state"), [(1, "checkpoint-4"), (2, "checkpoint-3")])
def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_to_the_same_bytes(
    folder, uninterrupted, monkeypatch, resume_every, state
):
    name, params = f"killed-{resume_every}", dataclasses.replace(PARAMS, resume_every=resume_every)
    killed = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests" / "helpers")!r})
import training_runs
from pathlib import Path
from rlaifv.training.dpo import Watch
def die(self, args, state, control, **kwargs):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Watch.on_step_begin = lambda self, args, state, control, **kwargs: die(self, args, state, control)
params = training_runs.TrainParams(**{dataclasses.asdict(params)!r})
training_runs.run(Path({str(folder)!r}), {name!r}, params)
"""
    process = subprocess.run([sys.executable, "-c", killed], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    (run_folder,) = (path.parent for path in (folder / name / "scratch").glob("train-*/job.json"))
    assert [path.name for path in (run_folder / "trainer").iterdir()] == [state]  # 4: step 1 of 3 of the second epoch
    half_written = run_folder / "trainer" / "checkpoint-6"
    half_written.mkdir()
    monkeypatch.setattr(job, "choose_layout", None)  # would be called to look again how pairs go through the model
    result = run(folder, name, params)
    assert (result.reference, result.layout) == ("reused", "packed, features kept")
    assert digests(folder / name / "out") == digests(folder / "uninterrupted" / "out")
    assert (run_folder / "finished.json").is_file() and not (run_folder / "trainer").exists()


def test_reference_log_probs_are_used_for_exactly_the_model_and_data_that_made_them(tmp_path, caplog):
    made_of = {"policy": "a", "data": "x"}
    ids = ["0:7", "1:8"]
    store = ReferenceStore(tmp_path, made_of, ids)
    store.save(np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    assert ReferenceStore(tmp_path, made_of, ids).load().tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
    assert ReferenceStore(tmp_path, {**made_of, "policy": "b"}, ids).load() is None
    assert ReferenceStore(tmp_path, made_of, ids[::-1]).load() is None
    stale = ReferenceStore(tmp_path, {**made_of, "policy": "b"}, ids)
    store.path.rename(stale.path)  # a file put in the place of another model's
    assert stale.load() is None
    assert "not used" in caplog.text


def test_a_second_policy_gets_its_own_reference(folder, uninterrupted):
    shared = folder / "uninterrupted" / "scratch"
    first = train(str(folder / "model"), folder / "pairs.parquet", PARAMS, folder / "second", shared, seed=5)
    later = train(first.checkpoints[-1], folder / "pairs.parquet", PARAMS, folder / "second", shared, seed=3)
    assert (first.reference, later.reference) == ("reused", "computed")
    assert log_rows(later)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_pairs_that_cannot_be_used_are_rejected_by_id_and_never_cut(folder):
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    rows[2]["chosen"] = "dog " * 300
    rows[5]["image"] = {"bytes": b"no image", "path": "x.png"}
    rows[7]["rejected"] = ""
    rows[9]["chosen"] = rows[9]["rejected"]
    pq.write_table(pa.Table.from_pylist(rows), folder / "bad.parquet")
    data = PairData(load_vlm(str(folder / "model"), device="cpu"), folder / "bad.parquet")
    reasons = {reject.id: reject.reason for reject in data.rejects}
    assert set(reasons) == {"2:102", "5:105", "7:107", "9:109"}
    assert "the context holds 256" in reasons["2:102"] and "cannot be decoded" in reasons["5:105"]
    assert [p.pair_id for p in data.pairs] == [f"{i}:{100 + i}" for i in (0, 1, 3, 4, 6, 8, 10, 11, 12)]
    assert len(data.pairs) + len(data.rejects) == len(rows)


def test_pairs_of_one_question_about_one_image_share_its_encoding(folder):
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    for row in rows[:6]:
        row["image"], row["question"] = {"bytes": picture(0), "path": "0.png"}, "what is in the image ?"
    pq.write_table(pa.Table.from_pylist(rows), folder / "same.parquet")
    data = PairData(load_vlm(str(folder / "model"), device="cpu"), folder / "same.parquet")
    assert {p.image for p in data.pairs[:6]} == {0}


def test_tokenizing_many_pairs_says_how_far_it_is_and_renders_each_prompt_once(folder, caplog, monkeypatch):
    vlm = load_vlm(str(folder / "model"), device="cpu")
    save_pairs(folder / "many.parquet", 4)
    clock = itertools.count(step=10)
    monkeypatch.setattr("rlaifv.store.time.monotonic", lambda: next(clock))
    rendered = []
    render = type(vlm.processor).apply_chat_template

    def count(self, messages, **kwargs):
        rendered.append(len(messages))
        return render(self, messages, **kwargs)

    monkeypatch.setattr(type(vlm.processor), "apply_chat_template", count)
    with caplog.at_level("INFO", logger="rlaifv"):
        data = PairData(vlm, folder / "many.parquet")
    assert "tokenize: 1/3, 0.05/s, 40 s left" in caplog.text and "tokenize: 3 done" in caplog.text
    assert rendered.count(1) == len(data.prompts) and rendered.count(2) == 2 * len(data.pairs)


def test_the_public_datasets_columns_are_enough_and_a_missing_one_is_named(folder, tmp_path):
    table = pq.read_table(folder / "pairs.parquet")
    (tmp_path / "parts").mkdir()
    pq.write_table(table.slice(0, 6), tmp_path / "parts" / "a.parquet")
    pq.write_table(table.slice(6), tmp_path / "parts" / "b.parquet")
    assert [file.name for file in parquet_files(tmp_path / "parts")] == ["a.parquet", "b.parquet"]
    pq.write_table(table.drop_columns(["chosen"]), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet has no column chosen"):
        parquet_files(tmp_path / "c.parquet")


def test_lora_is_merged_into_a_checkpoint_that_loads_with_from_pretrained_alone(folder, uninterrupted):
    result = run(folder, "lora", dataclasses.replace(PARAMS, lora_r=4, lora_alpha=8, learning_rate=1e-2))
    assert sorted(p.name for p in Path(result.checkpoints[-1]).iterdir()) == sorted(
        p.name for p in Path(uninterrupted.checkpoints[0]).iterdir()
    )
    before = load_vlm(str(folder / "model"), device="cpu").model.state_dict()
    after = AutoModelForImageTextToText.from_pretrained(result.checkpoints[-1]).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("language_model" in name and "_proj" in name for name in moved)
    rows = log_rows(result)
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[-1]["loss"] < 0.6


def test_bfloat16_with_gradient_checkpointing_trains_and_writes_bfloat16(folder):
    params = dataclasses.replace(PARAMS, dtype="bfloat16", gradient_checkpointing=True, epochs=1)
    result = run(folder, "bf16", params)
    assert AutoModelForImageTextToText.from_pretrained(result.checkpoints[-1]).dtype == torch.bfloat16
    lora = run(folder, "bf16", dataclasses.replace(params, lora_r=4))
    assert lora.reference == "computed", "its base is in bfloat16, the weights of the run before were in float32"


def test_a_loss_that_is_not_finite_stops_with_the_pair_ids_and_keeps_the_last_good_checkpoint(folder):
    with pytest.raises(FloatingPointError, match=r"pairs \d+:1\d\d, \d+:1\d\d") as error:
        # AdamW multiplies weights by 1 − learning_rate × weight_decay
        run(folder, "diverged", dataclasses.replace(PARAMS, weight_decay=1e38, scheduler="constant"))
    assert "learning_rate" in str(error.value)
    for checkpoint in (folder / "diverged" / "out").glob("checkpoint-*"):
        weights = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
        assert all(w.isfinite().all() for w in weights.values())


def test_chosen_answers_that_lose_their_likelihood_are_warned_about_once(caplog):
    watch = Watch(beta=0.1, collapse_nats=0.5)
    state = type("State", (), {"is_world_process_zero": True, "global_step": 9, "max_steps": 1000})()
    watch.on_train_begin(None, state, None)
    fine = {"rewards/chosen": -0.2, "length/chosen": 10.0}  # 0.2 nats a token
    collapsed = {"rewards/chosen": -0.8, "length/chosen": 10.0}
    for _ in range(30):
        watch.on_log(None, state, None, logs=fine)
    assert not caplog.records
    for _ in range(60):
        watch.on_log(None, state, None, logs=collapsed)
    assert len(caplog.records) == 1 and "have lost 0.5" in caplog.text


def test_every_epoch_has_its_own_order_and_an_interrupted_one_goes_on_in_it():
    step = 0
    order = EpochOrder([7] * 10, 4, seed=1, step=lambda: step)
    first = list(order)
    assert len(first) == len(order) == 8 and len(set(first)) == 8
    step = 1
    assert list(order) == first
    step = 2
    assert list(order) != first
    with pytest.raises(ValueError, match=r"set train\.batch_size"):
        EpochOrder([7] * 3, 4, seed=1, step=lambda: 0)


def test_a_step_starts_with_its_longest_pairs_and_which_pairs_it_has_is_left_to_chance():
    lengths = [3, 9, 5, 5, 8, 1, 2, 9, 4, 6]
    sorted_steps, plain_steps = (
        torch.tensor(list(EpochOrder(of, 4, seed=5, step=lambda: 0))).view(-1, 4).tolist() for of in (lengths, [0] * 10)
    )
    for longest_first, as_drawn in zip(sorted_steps, plain_steps, strict=True):
        assert longest_first == sorted(as_drawn, key=lambda pair: -lengths[pair])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 6, "micro_batch_size": 4}, "not a multiple"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "one weight per loss_type"),
        ({"load_in_4bit": True}, "lora_r"),
        ({"loss_type": ("sft", "sigmoid"), "segment_weight": 5.0}, "segment_weight 5 would weigh the sft loss"),
        ({"loss_type": ("exo_pair",)}, "exo_pair needs more than 0"),
        ({"accelerate_config": "params/accelerate/none.yaml"}, "does not exist"),
    ],
)
def test_parameters_that_cannot_work_together_stop_before_anything_is_loaded(folder, change, message):
    with pytest.raises(ValueError, match=message):
        run(folder, "wrong", dataclasses.replace(PARAMS, **change))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_log_takes_no_number_that_is_not_finite(tmp_path, value):
    history = [{"step": 1, "loss": 0.7, "grad_norm": 1.0}, {"step": 2, "loss": 0.6, "rewards/margins": value}]
    with pytest.raises(FloatingPointError, match=f"step 2: rewards/margins is {value}, expected a finite number"):
        write_log(history, tmp_path / "log.csv")
    assert not (tmp_path / "log.csv").exists()


DIES = """
import os, signal, sys
if os.environ.get("RANK") == "1":
    print("RuntimeError: Connection closed by peer", flush=True)  # the others' last words
    {death}
"""


@pytest.mark.parametrize(
    ("death", "kind", "said"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            MemoryError,
            r"one was killed \(SIGKILL\), usually for memory; the same",
        ),
        ("os._exit(3)", RuntimeError, "RuntimeError: Connection closed by peer; the same"),
    ],
)
def test_a_process_that_dies_is_one_line_with_the_way_out(tmp_path, monkeypatch, death, kind, said):
    (tmp_path / "sitecustomize.py").write_text(DIES.format(death=death))
    (tmp_path / "job.json").write_text("{}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    with pytest.raises(kind, match=f"^training in 2 processes failed: {said} command goes on where it was$"):
        launch(tmp_path / "job.json", TrainParams(processes=2), "rlaifv.training.job")


STARTS = """
import subprocess, sys
from rlaifv.store.processes import end_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], preexec_fn=end_with_parent)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_what_launches_the_processes_of_a_run_ends_with_the_kernel_that_started_it():
    with subprocess.Popen([sys.executable, "-c", STARTS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as starter:
        child = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
    child.wait(timeout=30)


def test_two_processes_give_the_losses_of_one(folder, uninterrupted):
    result = run(folder, "two", dataclasses.replace(PARAMS, processes=2))
    one, two = log_rows(uninterrupted), log_rows(result)
    for key in ("loss", "rewards_margins", "logps_chosen", "learning_rate", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-4, abs=1e-6)
