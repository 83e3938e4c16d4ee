"""Chunks that are spread over a cluster end in the bytes of one process, whoever dies on the way. Needs Ray
(`pip install 'ray[data]'`), which simulates two machines on this one."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from training_runs import PARAMS as TRAIN
from training_runs import digests, folder, run

from rlaifv import ROOT
from rlaifv.evaluation.hallucination import Split, evaluate_checkpoints
from rlaifv.params import ClusterParams, load_params
from rlaifv.records import Candidate, Claim, Instruction, ModelRecord, read_records
from rlaifv.steps.divide import divide
from rlaifv.steps.feedback import feedback
from rlaifv.steps.generate import generate
from rlaifv.steps.self_feedback import write_logps
from rlaifv.store import Store, cluster
from rlaifv.store.cluster import ClusterProblem
from rlaifv.tinyworld.coco import write_world
from rlaifv.vlm.loading import load_model, load_vlm

__all__ = ["folder"]  # a fixture: pytest finds it by its name in this module

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
PARAMS, TINY = load_params(), ROOT / "models" / "tiny"
RAY = ClusterParams(engine="ray", workers=4)
CHUNKS = [[n] for n in range(24)]


@pytest.fixture(scope="module")
def machines():
    """A head that only keeps books, and two machines with room for two workers each; the second may be taken away."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    nodes = [made.add_node(num_cpus=4, num_gpus=0) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", made.address)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not know this file
        yield made, nodes
    made.shutdown()


def slowly(chunk):
    time.sleep(0.1)
    return [{"n": n, "of": "x" * n} for n in chunk], []


def published(store: Store, folder: Path) -> bytes:
    store.publish(folder / "rows.jsonl", len(CHUNKS), 0)
    return (folder / "rows.jsonl").read_bytes()


def alone(folder: Path) -> bytes:
    store = Store("stage", {}, folder / "alone")
    store.run(CHUNKS, slowly)
    return published(store, folder / "alone")


def test_sampling_on_four_workers_gives_the_bytes_of_one_process(machines, tmp_path):
    instructions = [Instruction(str(number), f"{number}.png", "What is in the image?") for number in range(8)]
    for number, instruction in enumerate(instructions):
        Image.effect_noise((64, 64), 20 + 10 * number).convert("RGB").save(tmp_path / instruction.image_path)
    params = dataclasses.replace(load_params().generate, samples=2, batch_size=2, max_reject_rate=1.0)
    written = {}
    for engine in ("none", "ray"):
        store = Store("generate", {}, tmp_path / engine, dataclasses.replace(RAY, engine=engine))
        out = tmp_path / engine / "candidates.jsonl"
        generate(lambda: load_vlm(str(ROOT / "models/tiny/policy")), instructions, tmp_path, params, 1, store, out)
        written[engine] = out.read_bytes() + out.with_name("rejects.jsonl").read_bytes()
    assert written["ray"] == written["none"] != b""


@pytest.fixture(scope="module")
def small_round(tmp_path_factory):
    """A little world, and answers, claims and a split of it."""
    folder = tmp_path_factory.mktemp("round")
    write_world(folder, seed=5, train=8, dev=6, test=1)
    rows = read_records(folder / "instructions_train.jsonl", Instruction)
    said = ["There is a red dog on the left. There are two cups.", "There is a cat. A blue chair is on the right."]
    answers = [
        Candidate(f"{row.id}#{k}", row.id, k, f"{text} It is picture {n}.", 9, "stop", 1, "policy")
        for n, row in enumerate(rows)
        for k, text in enumerate(said)
    ]
    claims = [
        Claim(f"{c.id}/0", c.id, "There is a dog.", f"Is there a dog, or {k} of them?") for k, c in enumerate(answers)
    ]
    dev = Split("dev", read_records(folder / "instructions_dev.jsonl", Instruction), {}, {}, [], folder / "images")
    return SimpleNamespace(folder=folder, rows=rows, answers=answers, claims=claims, dev=dev)


def divide_it(work, store, out):
    questions = {row.id: row.question for row in work.rows}
    params = dataclasses.replace(PARAMS.divide, batch_size=4, max_reject_rate=1.0)
    divide(partial(load_vlm, f"{TINY}/divider"), work.answers, questions, params, 1, store, out)


def judge_it(work, store, out):
    image_of = {row.id: row.image_path for row in work.rows}
    images = {c.id: image_of[c.instruction_id] for c in work.answers}
    params = dataclasses.replace(PARAMS.feedback, batch_size=2)
    feedback(partial(load_vlm, f"{TINY}/labeler"), work.claims, images, work.folder / "images", params, store, out)


def evaluate_it(work, store, out):
    copies = [work.folder / f"checkpoint-{k}" for k in (1, 2, 3)]
    for copy in copies:
        shutil.copytree(f"{TINY}/policy", copy, dirs_exist_ok=True)
    params = dataclasses.replace(PARAMS.evaluate, batch_size=3, max_new_tokens=40)
    dev = dataclasses.replace(work.dev, objects={}, annotated=False)
    evaluate_checkpoints(copies, dev, params, "Yes or no?", store, load_folder, out, judge_nothing)


def load_folder(folder):
    return load_vlm(str(folder))


def judge_nothing(rows):
    return [
        row | {"claims": [{"p_yes": 1.0, "p_no": 0.0}], "problem": "", "labeler": "x", "same_labeler": True}
        for row in rows
    ]


def weigh_it(work, store, out):
    load = partial(load_both, f"{TINY}/policy", f"{TINY}/labeler")
    write_logps(load, work.answers, work.rows, work.folder / "images", 2, store, out)


def load_both(*paths):
    return tuple(load_vlm(path) for path in paths)


@pytest.mark.parametrize("do", [divide_it, judge_it, evaluate_it, weigh_it])
def test_every_stage_on_four_workers_gives_the_bytes_of_one_process(machines, small_round, tmp_path, do):
    written = {}
    for engine in ("none", "ray"):
        out = tmp_path / engine / "rows.jsonl"
        do(small_round, Store("stage", {}, tmp_path / engine, dataclasses.replace(RAY, engine=engine)), out)
        written[engine] = {file.name: file.read_bytes() for file in out.parent.glob("*.jsonl")}
    assert written["ray"] == written["none"] and len(written["none"]["rows.jsonl"]) > 500


def test_a_node_that_has_another_checkpoint_is_named(machines, tmp_path):
    def work(chunk):
        load_model(ModelRecord("models/tiny/policy", None, "float32", "cpu", "0123456789abcdef"))

    with pytest.raises(ClusterProblem, match=r"chunk \d+ on \S+: ValueError: models/tiny/policy has changed since"):
        Store("stage", {}, tmp_path, RAY).run(CHUNKS, work)


def test_training_on_two_machines_of_the_cluster_is_that_of_one(machines, folder):
    two = dataclasses.replace(TRAIN, processes=2, machines=2)
    run(folder, "one", dataclasses.replace(two, machines=1))
    run(folder, "two", two)
    assert digests(folder / "two" / "out") == digests(folder / "one" / "out")
    with pytest.raises(RuntimeError, match=r"train.machines is 3, the Ray cluster has \d nodes"):
        run(folder, "three", dataclasses.replace(TRAIN, processes=6, machines=3, batch_size=12))


def test_a_killed_worker_is_replaced_and_its_chunk_done_again(machines, tmp_path):
    marker = tmp_path / "killed"

    def work(chunk):
        if chunk == [5] and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return slowly(chunk)

    store = Store("stage", {}, tmp_path, RAY)
    store.run(CHUNKS, work)
    assert marker.exists() and published(store, tmp_path) == alone(tmp_path)


def test_a_chunk_that_raises_stops_the_run_in_a_line_and_what_is_done_stays(machines, tmp_path):
    def work(chunk):
        if chunk == [20]:
            raise ValueError("the picture is upside down")
        return slowly(chunk)

    store = Store("stage", {}, tmp_path, RAY)
    with pytest.raises(ClusterProblem, match=r"chunk 20 on .*: ValueError: the picture is upside down"):
        store.run(CHUNKS, work)
    assert len(list(store.folder.glob("*.jsonl"))) >= 10


def test_a_killed_driver_goes_on_and_does_nothing_twice(machines, tmp_path):
    script = f"""
import time
from pathlib import Path
from rlaifv.params import ClusterParams
from rlaifv.store import Store

def work(chunk):
    with open({str(tmp_path / "asked")!r}, "a") as file:
        file.write(f"{{chunk[0]}}\\n")
    time.sleep(0.3)
    return [{{"n": n, "of": "x" * n}} for n in chunk], []

store = Store("stage", {{}}, Path({str(tmp_path)!r}), ClusterParams(engine="ray", workers=4))
store.run([[n] for n in range(24)], work)
store.publish(Path({str(tmp_path / "rows.jsonl")!r}), 24, 0)
"""
    command = [sys.executable, "-c", script]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("stage-*/*.jsonl"))) < 6 and time.monotonic() < until:
        time.sleep(0.05)
    first.kill()
    first.wait()
    time.sleep(1)  # Ray ends the workers of a dead driver
    done = {int(path.stem) for path in tmp_path.glob("stage-*/*.jsonl")}
    (tmp_path / "asked").write_text("")
    assert 6 <= len(done) < 24
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert not done & {int(line) for line in (tmp_path / "asked").read_text().split()}
    assert (tmp_path / "rows.jsonl").read_bytes() == alone(tmp_path)


def test_a_machine_that_dies_is_done_without(machines, tmp_path):
    made, nodes = machines
    store = Store("stage", {}, tmp_path, RAY)
    gone = False

    def done() -> int:
        return len(list(store.folder.glob("*.jsonl")))

    def take_away():
        nonlocal gone
        while done() < 6:
            time.sleep(0.05)
        made.remove_node(nodes.pop(), allow_graceful=False)
        gone = done() < len(CHUNKS)

    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    store.run(CHUNKS, slowly)
    thread.join(30)
    assert gone and published(store, tmp_path) == alone(tmp_path)


def test_unlike_machines_are_refused_by_name_unless_they_may_be_mixed(machines, tmp_path):
    params = dataclasses.replace(RAY, workers=1)
    store = Store("stage", {}, tmp_path, params)
    (store.folder / cluster.MACHINES).write_text(json.dumps({"gpu-7": "H100, torch 1.0"}))
    with pytest.raises(ClusterProblem, match=r"computes with .*gpu-7 with H100, torch 1.0.*cluster.mixed: true"):
        store.run(CHUNKS, slowly)
    mixed = Store("stage", {}, tmp_path, dataclasses.replace(params, mixed=True))
    mixed.run(CHUNKS[:2], slowly)


def test_a_machine_that_sees_another_disk_is_refused(tmp_path):
    (tmp_path / cluster.TOKEN).write_text("another driver's")
    with pytest.raises(ValueError, match="must be on a disk that all nodes share"):
        cluster.check_disk(tmp_path, "this driver's")


def test_too_few_machines_are_counted_in_a_line(machines, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "WAIT", 0.0)
    with pytest.raises(ClusterProblem, match=r"cluster.workers = 99 .* have room for [24]; lower it or start nodes"):
        Store("stage", {}, tmp_path, dataclasses.replace(RAY, workers=99)).run(CHUNKS, slowly)


def test_no_cluster_at_the_address_is_said_in_a_line_within_a_minute(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    started = time.monotonic()
    with pytest.raises(ClusterProblem, match=r"no Ray cluster at RAY_ADDRESS = 127.0.0.1:1 .*cluster.engine: none"):
        Store("stage", {}, tmp_path, RAY).run(CHUNKS, slowly)
    assert time.monotonic() - started < 60


def test_ray_that_is_not_installed_is_said_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterProblem, match=r"pip install 'ray\[data\]'"):
        Store("stage", {}, tmp_path, RAY).run(CHUNKS, slowly)
