"""The processes of a training run on several machines: a launcher on each of them, which find one another.

Who starts the launchers is Slurm, inside an allocation, or Ray, in the cluster at RAY_ADDRESS. All machines see the
repository and its scratch folder on a shared disk; the first one writes.

    srun … python -m rlaifv.training.machines slurm ADDRESS PORT MACHINES accelerate …   # what `command_of` makes
"""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence

from rlaifv import ROOT
from rlaifv.store.cluster import ClusterProblem, connected, nodes, one_line
from rlaifv.store.processes import end_with_parent

PORTS = range(20_000, 30_000)


def command_of(launcher: Sequence[str], machines: int, processes: int) -> list[str]:
    """The command that runs an `accelerate launch` on so many machines, `processes` in all; it ends when one of them
    fails.

    Raises RuntimeError, in a line, where there is neither an allocation of Slurm's with so many nodes nor Ray.
    """
    me = [sys.executable, "-m", __name__]
    port = str(secrets.choice(PORTS))
    if "SLURM_JOB_ID" in os.environ:
        there = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        if there < machines:
            raise RuntimeError(
                f"train.machines is {machines}, this allocation of Slurm's has {there} node{'s' * (there > 1)}: "
                f"submit with --nodes={machines}"
            )
        step = ["srun", "--overlap", f"--nodes={machines}", f"--ntasks={machines}", "--ntasks-per-node=1"]
        # this process is on the allocation's first node, as is the task of rank 0
        return [*step, "--kill-on-bad-exit=1", *me, "slurm", own_address(), port, str(machines), *launcher]
    if "RAY_ADDRESS" in os.environ:
        return [*me, "ray", str(machines), str(processes // machines), port, *launcher]
    raise RuntimeError(
        f"train.machines is {machines}: start it in an allocation of Slurm's (slurm/) or where RAY_ADDRESS is a Ray "
        "cluster, or write machines: 1"
    )


def on_machine(launcher: Sequence[str], rank: int, machines: int, address: str, port: str) -> list[str]:
    """The launcher of one machine: `accelerate launch` is told before its own options which one it is."""
    place = launcher.index("accelerate.commands.launch") + 1
    who = ["--num_machines", str(machines), "--machine_rank", str(rank)]
    where = ["--main_process_ip", address, "--main_process_port", port, "--rdzv_backend", "static"]
    return [*launcher[:place], *who, *where, *launcher[place:]]


def own_address() -> str:
    """This machine's address as others see it."""
    return socket.gethostbyname(socket.gethostname())


def run_on_ray(machines: int, processes: int, port: str, launcher: list[str]) -> int:
    """Run a launcher on so many nodes of the Ray cluster, each with `processes` GPUs where it has any. Raises
    ClusterProblem for too few of them and, naming the node, for a launcher that fails."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with connected():
        able = sorted(nodes(), key=lambda node: node["NodeID"])
        gpus = any(node["Resources"].get("GPU") for node in able)
        able = [node for node in able if not gpus or node["Resources"].get("GPU", 0) >= processes]
        if len(able) < machines:
            each = f" with {processes} GPUs each" if gpus else ""
            raise ClusterProblem(f"train.machines is {machines}, the Ray cluster has {len(able)} nodes{each}")
        chosen = able[:machines]
        address = chosen[0]["NodeManagerAddress"]
        task = ray.remote(**({"num_gpus": processes} if gpus else {"num_cpus": 1}), max_retries=0)(run_launcher)
        waiting = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                on_machine(launcher, rank, machines, address, port)
            ): node["NodeManagerHostname"]
            for rank, node in enumerate(chosen)
        }
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            host = waiting.pop(done)
            try:
                said = ray.get(done)
            except RayError as error:
                said = f"RuntimeError: {one_line(error)}"
            if said:  # the others would wait for it: leaving the cluster ends them
                print(said)
                raise ClusterProblem(f"the launcher on {host} failed")
    return 0


def run_launcher(command: list[str]) -> str:
    """Run a launcher here, on one of the machines; what it said last, or "" when all went well. Its own lines come
    after the name of this machine in Ray's log of the driver."""
    lines: list[str] = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=end_with_parent, **pipes) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines = [*lines[-200:], line]
    return "".join(lines) if process.returncode else ""


def main(arguments: list[str]) -> int:
    kind, *rest = arguments
    if kind == "ray":
        machines, processes, port, *launcher = rest
        try:
            return run_on_ray(int(machines), int(processes), port, launcher)
        except ClusterProblem as problem:
            print(f"RuntimeError: {problem}", file=sys.stderr)
            return 1
    address, port, machines, *launcher = rest
    command = on_machine(launcher, int(os.environ["SLURM_PROCID"]), int(machines), address, port)
    os.execv(command[0], command)  # so that what Slurm ends is the launcher itself


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
