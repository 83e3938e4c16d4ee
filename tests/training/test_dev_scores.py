"""Checkpoints are scored on dev as they are written, and the best few stay on disk, whatever kills the run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from tiny_llava import picture
from training_runs import PARAMS, digests, folder

from rlaifv import ROOT
from rlaifv.evaluation.hallucination import evaluate_checkpoints, load_split
from rlaifv.params import EvaluateParams, TrainParams
from rlaifv.records import Instruction, ModelRecord, read_jsonl, write_jsonl
from rlaifv.stage import Paths
from rlaifv.steps.select import choose
from rlaifv.store import Store
from rlaifv.training import checkpoints
from rlaifv.training.dev_scores import Dev
from rlaifv.training.job import TrainResult, train
from rlaifv.training.run_folder import read_whole
from rlaifv.vlm.loading import load_model

__all__ = ["folder"]  # a fixture: pytest finds it by its name in this module

KEEP_TWO = dataclasses.replace(PARAMS, keep_checkpoints=2, learning_rate=3e-2)
ANIMALS = ("dog", "cat", "kite")


@pytest.fixture(scope="module")
def dev(folder) -> Dev:
    """Seven images with an animal each, asked for a description and whether there is a dog."""
    images, prepared = folder / "images", folder / "prepared"
    images.mkdir()
    prepared.mkdir()
    instances = {"images": [], "annotations": [], "categories": [{"id": n, "name": a} for n, a in enumerate(ANIMALS)]}
    for n in range(7):
        (images / f"{n}.png").write_bytes(picture(n))
        instances["images"].append({"id": n, "file_name": f"{n}.png"})
        instances["annotations"].append({"id": n, "image_id": n, "category_id": n % 3})
    (prepared / "dev_instances.json").write_text(json.dumps(instances))
    write_jsonl(prepared / "dev.jsonl", [Instruction(f"d{n}", f"{n}.png", "describe it .") for n in range(7)])
    asked = {"question": "is there a dog ?", "type": "existence"}
    questions = [
        {"id": f"q{n}", "image_path": f"{n}.png", "answer": "no" if n % 3 else "yes", **asked} for n in range(7)
    ]
    write_jsonl(prepared / "dev_questions.jsonl", questions)
    model = ModelRecord("somewhere", None, "float32", "auto", "0")
    evaluate = EvaluateParams(beams=1, repetition_penalty=1.0, max_new_tokens=12, batch_size=4)
    base = {"checkpoint": "policy", "response_hallucination": 0.5, "recall": 0.2}
    return Dev(model, str(prepared), str(images), evaluate, "", base, 0.05)


def run(folder: Path, name: str, dev: Dev, params: TrainParams = KEEP_TWO) -> TrainResult:
    out, scratch = folder / name / "out", folder / name / "scratch"
    return train(str(folder / "model"), folder / "pairs.parquet", params, out, scratch, seed=3, dev=dev)


@pytest.fixture(scope="module")
def all_rows(folder, dev) -> list[dict]:
    """What the stage evaluate says of all checkpoints of a run that keeps all of them."""
    params = dataclasses.replace(KEEP_TWO, keep_checkpoints=None)
    kept = run(folder, "all", None, params)
    split, load = load_split("dev", Path(dev.prepared), Path(dev.image_root)), partial(load_model, dev.model)
    store = Store("evaluate", {}, folder / "all" / "scratch")
    paths = [Path(path) for path in kept.checkpoints]
    return evaluate_checkpoints(paths, split, dev.evaluate, dev.suffix, store, load, folder / "all" / "dev.jsonl")


@pytest.fixture(scope="module")
def best_two(folder, dev, all_rows) -> dict[str, str]:
    """The bytes of an uninterrupted run that keeps two."""
    run(folder, "two", dev)
    return digests(folder / "two" / "out")


def test_every_checkpoint_has_the_row_that_evaluate_would_give_it_and_the_best_two_are_there(
    folder, dev, all_rows, best_two, monkeypatch
):
    out = folder / "two" / "out"
    assert len({row["response_hallucination"] for row in all_rows}) > 1, "they must differ for the test to say anything"
    assert [json.loads((out / f"checkpoint-{k}.json").read_text()) for k in (1, 2, 3, 4)] == all_rows
    chosen = choose(all_rows, dev.base, dev.max_recall_drop)["checkpoint"]
    there = [path.name for path in sorted(out.iterdir()) if path.is_dir()]
    assert chosen in there and len(there) == 2
    assert {digests(out / chosen)["model.safetensors"]} == {digests(folder / "all/out" / chosen)["model.safetensors"]}

    monkeypatch.setattr(Paths, "__init__", lambda self, _: self.__dict__.update(iteration="1", checkpoints=out))
    paths = Paths("1").trained
    assert [path.name for path in paths] == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    store = Store("evaluate", {}, folder / "two" / "evaluate")
    rows = evaluate_checkpoints(paths, None, None, "", store, None, folder / "two" / "dev.jsonl")  # loads no model
    assert rows == all_rows == read_jsonl(folder / "two" / "dev.jsonl")


def test_no_more_checkpoints_than_asked_for_and_the_one_just_written_lie_on_disk(folder, dev, monkeypatch):
    seen, record = [], checkpoints.record_whole

    def watch(run, part, **rest):
        record(run, part, **rest)
        seen.append(sum(path.is_dir() for path in (run / "published").iterdir()))

    monkeypatch.setattr(checkpoints, "record_whole", watch)
    result = run(folder, "watched", dev)
    assert max(seen) == 3 and len(result.checkpoints) == 2


@pytest.mark.parametrize("moment", ["before it is scored", "after it is scored", "before the next step"])
def test_a_run_killed_around_a_checkpoint_ends_in_the_same_bytes(folder, dev, best_two, moment):
    name = moment.replace(" ", "-")
    where = {
        "before it is scored": "checkpoints.score_checkpoint = on(checkpoints.score_checkpoint, 3, before=True)",
        "after it is scored": "checkpoints.score_checkpoint = on(checkpoints.score_checkpoint, 3, before=False)",
        "before the next step": "Watch.on_step_begin = on(Watch.on_step_begin, 5, before=True)",
    }[moment]
    script = f"""
import json, os, signal, sys
sys.path[:0] = [{str(ROOT / "tests" / "helpers")!r}, {str(ROOT / "tests" / "training")!r}]
from pathlib import Path
import test_dev_scores
from rlaifv.training import checkpoints
from rlaifv.training.dpo import Watch
from rlaifv.training.dev_scores import Dev
calls = iter(range(1, 1000))
def on(function, call, before):
    def dying(*args, **kwargs):
        now = next(calls) == call
        result = None if now and before else function(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return dying
{where}
dev = Dev.read(json.loads({json.dumps(dataclasses.asdict(dev))!r}))
test_dev_scores.run(Path({str(folder)!r}), {name!r}, dev)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    (started,) = (job.parent for job in (folder / name / "scratch").glob("train-*/job.json"))
    assert any(part.startswith("trainer/") for part in read_whole(started)), "there is something to go on from"
    run(folder, name, dev)
    assert digests(folder / name / "out") == best_two


def test_two_processes_share_dev_and_say_what_one_says(folder, dev, all_rows):
    run(folder, "shared", dev, dataclasses.replace(KEEP_TWO, processes=2))
    rows = [json.loads((folder / "shared/out" / f"checkpoint-{k}.json").read_text()) for k in (1, 2, 3, 4)]
    for row, alone in zip(rows, all_rows, strict=True):
        assert row["checkpoint"] == alone["checkpoint"] and row["n"] == alone["n"] == 7
        assert row["yes_no"]["n"] == 7 and set(row) == set(alone)
        assert row["recall"] == pytest.approx(alone["recall"], abs=1 / 7)


def test_keeping_the_best_needs_dev(folder, dev):
    with pytest.raises(ValueError, match=r"train\.keep_checkpoints chooses on dev"):
        run(folder, "without", None)
    with pytest.raises(ValueError, match=r"train\.keep_checkpoints chooses on dev"):
        run(folder, "null", dev, PARAMS)
