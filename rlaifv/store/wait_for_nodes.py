"""Wait until so many nodes are in the cluster at RAY_ADDRESS, as a job that has started them must.

python -m rlaifv.store.wait_for_nodes 2
"""

import sys
import time

from rlaifv.store.cluster import WAIT, ClusterProblem, connected, nodes


def wait_for_nodes(wanted: int) -> int:
    """How many have come after `WAIT` seconds, or as soon as all have. Raises ClusterProblem without a cluster."""
    until = time.monotonic() + WAIT
    while True:
        try:
            with connected():
                while len(nodes()) < wanted and time.monotonic() < until:
                    time.sleep(1)
                return len(nodes())
        except ClusterProblem:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def main(arguments: list[str]) -> int:
    wanted = int(arguments[0])
    try:
        came = wait_for_nodes(wanted)
    except ClusterProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    print(f"{came} of {wanted} nodes are in the cluster", file=sys.stderr if came < wanted else sys.stdout)
    return int(came < wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
