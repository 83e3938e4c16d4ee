"""Chunks that are spread over a cluster end in the bytes of one process, whoever dies on the way. Needs Ray
(`pip install 'ray[data]'`), which simulates two machines on this one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from rlaifv import ROOT
from rlaifv.params import ClusterParams, load_params
from rlaifv.records import Instruction
from rlaifv.steps.generate import generate
from rlaifv.store import Store, cluster
from rlaifv.store.cluster import ClusterProblem
from rlaifv.vlm.loading import load_vlm

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
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
