"""Python imports this by itself in each process that has this folder on its PYTHONPATH: what goes wrong in there.

ATTACK_FAULT in a notebook's kernel: `kill MODULE NAME N`: it is killed before the N-th call of a function (from 0);
`nan MODULE NAME N`: from that call on the function's tensors are NaN. ATTACK_WITHOUT in every process: a guard of
`guards.py` is taken out.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from guards import GUARDS, after_import


def fault(how: str, module: str, name: str, call: str) -> None:
    def spoil(loaded) -> None:
        owner = loaded
        *owners, attribute = name.split(".")
        for part in owners:
            owner = getattr(owner, part)
        original, calls = getattr(owner, attribute), iter(range(10**9))

        def spoiled(*args, **kwargs):
            late = next(calls) >= int(call)
            if late and how == "kill":
                os.kill(os.getpid(), 9)
            result = original(*args, **kwargs)
            return spoiled_tensors(result) if late and how == "nan" else result

        setattr(owner, attribute, spoiled)

    after_import(module, spoil)


def spoiled_tensors(result):
    """A tensor, or a list or a dict of them, with NaN for every number."""
    if isinstance(result, dict):
        return {key: spoiled_tensors(value) for key, value in result.items()}
    if isinstance(result, list):
        return [spoiled_tensors(value) for value in result]
    return result * float("nan") if hasattr(result, "is_floating_point") and result.is_floating_point() else result


if "ipykernel_launcher" in sys.orig_argv and "ATTACK_FAULT" in os.environ:
    fault(*os.environ["ATTACK_FAULT"].split())
if guard := os.environ.get("ATTACK_WITHOUT"):
    GUARDS[guard].take_out()
sys.path.remove(str(Path(__file__).resolve().parents[1]))
