"""The chunks of a stage on several GPUs or machines: a worker of Ray Data for each GPU, each with a model of its own.

Ray (`pip install 'ray[data]'`) starts the workers, gives the next chunk to whoever is free and replaces workers
and nodes that die. A chunk's bytes follow from its input alone, so they are the same with any number of workers, in any
order and after any death. A worker reads models and images by path, from the disk that all machines share, and writes
its chunk's file there itself: only numbers travel back.
"""

import contextlib
import json
import logging
import os
import platform
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlaifv import ROOT
from rlaifv.params import ClusterParams
from rlaifv.records import to_json, write_atomic

log = logging.getLogger(__name__)

TOKEN, MACHINES = "shared-disk", "machines.json"
"""Files beside the chunks: what every node must read there, and on what machines the work was begun."""

WAIT = 60.0
"""Seconds for nodes to join the cluster and to say what they are."""

RESTARTS = 3
"""How often a worker that dies is replaced: one that runs out of memory dies every time."""

PAIR = 2
"""Cores of a worker where there is no GPU."""


class ClusterProblem(RuntimeError):
    """The cluster cannot do the work; the message says which node or key, and the way out."""


def spread(
    do: Callable[[int, Any], None], chunks: Mapping[int, Any], folder: Path, params: ClusterParams
) -> Iterator[int]:
    """Have the workers do all chunks, each by its number; yields a number when its chunk is done.

    Args:
        do: does a chunk and writes what comes of it. Each worker has a copy of it, and so of what it loads.
        chunks: by number; they are sent to the workers.
        folder: where the work is kept, on a disk that all nodes see under the same path.

    Raises:
        ClusterProblem: no Ray cluster there, too few GPUs, a node that sees another disk or is unlike the others, or a
            chunk that raised an error. What is done then is kept.
    """
    with connected():
        import ray.data
        from ray import cloudpickle
        from ray.exceptions import RayError

        size, resources = room(params)
        token = secrets.token_hex(8)
        write_atomic(folder / TOKEN, token)
        check_nodes(folder, token, resources, params)
        log.info("cluster: %d workers on %s", size, ", ".join(sorted(node["NodeManagerHostname"] for node in nodes())))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        rows = [{"number": number, "chunk": cloudpickle.dumps(chunk)} for number, chunk in chunks.items()]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_args=(cloudpickle.dumps(do), str(folder), token),
            compute=ray.data.ActorPoolStrategy(size=min(size, len(rows)), max_tasks_in_flight_per_actor=1),
            max_restarts=RESTARTS,
            max_task_retries=-1,
            **resources,
        )
        try:
            for row in done.iter_rows():
                if row["problem"]:
                    raise ClusterProblem(f"chunk {row['number']} on {row['host']}: {row['problem']}")
                yield row["number"]
        except RayError as error:
            raise ClusterProblem(f"Ray ended the work: {one_line(error)}; what is done is kept, run it again") from None


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A connection to the cluster at RAY_ADDRESS, or a cluster of this machine alone, for the time of a `with`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:  # without a token whoever reaches a port may run code here
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ModuleNotFoundError:
        raise ClusterProblem(
            "cluster.engine is ray, which is not installed: pip install 'ray[data]', or cluster.engine: none"
        ) from None
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        if found := re.fullmatch(r"([^/]+):(\d+)", address or ""):  # Ray itself would try for minutes
            socket.create_connection((found[1], int(found[2])), timeout=10).close()
        ray.init(
            address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"no Ray cluster at RAY_ADDRESS = {address}" if address else "Ray does not start on this machine"
        raise ClusterProblem(f"{where} ({one_line(error)}): start one, or cluster.engine: none") from None
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[dict[str, Any]]:
    """The cluster's living nodes that have anything to work with."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & node["Resources"].keys()]


def room(params: ClusterParams) -> tuple[int, dict[str, float]]:
    """How many workers there will be, and what each takes. Waits for nodes that have not joined yet, for `WAIT`
    seconds where `workers` says how many there must be."""
    until = time.monotonic() + WAIT
    while True:
        gpus = [node["Resources"].get("GPU", 0) for node in nodes()]
        cores = [node["Resources"].get("CPU", 0) for node in nodes()]
        if any(gpus):
            resources = {"num_gpus": params.gpus_per_worker}
            possible = sum(int(count // params.gpus_per_worker) for count in gpus)
        else:
            resources = {"num_cpus": min([PAIR, *cores])}
            possible = sum(int(count // resources["num_cpus"]) for count in cores)
        if possible >= (params.workers or 1):
            return params.workers or possible, resources
        if time.monotonic() > until:
            wanted = f"cluster.workers = {params.workers}" if params.workers else "a worker"
            raise ClusterProblem(
                f"{wanted} of cluster.gpus_per_worker = {params.gpus_per_worker} finds no room: {len(cores)} nodes "
                f"with {sum(gpus):g} GPUs and {sum(cores):g} cores have room for {possible}; lower it or start nodes"
            )
        time.sleep(1)


def check_nodes(folder: Path, token: str, resources: Mapping[str, float], params: ClusterParams) -> None:
    """Ask every node what it is, and whether it sees the same disk. Raises ClusterProblem, which names the node."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    able = [node for node in nodes() if "num_cpus" in resources or node["Resources"].get("GPU")]
    ask = ray.remote(**resources)(machine)
    asked = [
        (
            node["NodeManagerHostname"],
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(folder), token
            ),
        )
        for node in able
    ]
    known = json.loads((folder / MACHINES).read_text()) if (folder / MACHINES).is_file() else {}
    found = list(known.items())
    for host, answer in asked:
        try:
            found.append((host, ray.get(answer, timeout=WAIT)))
        except RayError as error:
            raise ClusterProblem(f"node {host} cannot be used: {one_line(error)}") from None
    first, usual = found[0]
    for host, what in found:
        if what != usual and not params.mixed:
            raise ClusterProblem(
                f"node {host} computes with {what}, {first} with {usual}: the last bits of results would depend on who "
                "did what; use like nodes, or cluster.mixed: true"
            )
    if len({what for _, what in found}) > 1:
        log.warning("cluster.mixed: %s", ", ".join(f"{host} with {what}" for host, what in found))
    write_atomic(folder / MACHINES, to_json(dict(found)) + "\n")


def machine(folder: str, token: str) -> str:
    """What decides the last bits of what this machine computes. Raises ValueError where it sees another disk."""
    import torch

    check_disk(Path(folder), token)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    device = gpu or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return ", ".join([device, *(f"{name} {version(name)}" for name in ("torch", "transformers"))])


def check_disk(folder: Path, token: str) -> None:
    file = folder / TOKEN
    if not file.is_file() or file.read_text() != token:
        raise ValueError(f"{file} is not what the driver wrote: the folder must be on a disk that all nodes share")


class Worker:
    """Does chunks in a process of its own, one after the other."""

    def __init__(self, do: bytes, folder: str, token: str) -> None:
        from ray import cloudpickle

        check_disk(Path(folder), token)
        self.do = cloudpickle.loads(do)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from ray import cloudpickle

        problem = ""
        try:
            self.do(row["number"], cloudpickle.loads(row["chunk"]))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return {"number": row["number"], "host": platform.node(), "problem": problem}


def one_line(error: BaseException) -> str:
    """The last line of a message, which of Ray's is the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
