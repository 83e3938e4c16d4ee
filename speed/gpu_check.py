"""Whether a GPU computes what it must, and how fast: python speed/gpu_check.py [--device cuda] [--size 7b]

A LLaVA-shaped model with random weights (7B in bfloat16, nothing is downloaded) answers, is asked and is trained, each
measurement of speed/ in a process of its own, ours beside what a user would run instead. The numbers go to
speed/results with the hardware's name; a difference beyond the dtype's own noise is exit code 1.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

FLOAT32_LOGPROBS, FLOAT32_LOSS = 1e-4, 1e-5
"""Largest difference in nats of a log-prob, and of the loss relative to it, in float32."""

NOISE = 3
"""In bfloat16, shared prefixes may differ from single rows by this many times what batches of plain rows do."""

BFLOAT16_LOSS = 0.01


def checks(device: str, size: str) -> list[tuple[str, list[str]]]:
    """The scripts with their options: a 7B is trained with LoRA, for its full training takes more than one GPU."""
    common = ["--device", device, "--json", *(["--keep"] if device == "cuda" else [])]
    recompute = ["--checkpointing", "--epochs", "1"]
    smaller = "1b" if size == "7b" else size
    return [
        ("feedback.py", [*common, "--size", size]),
        ("generate.py", [*common, "--size", size]),
        ("train.py", [*common, "--size", size, "--lora", "64", "--pairs", "12", "--micro", "4", *recompute]),
        ("train.py", [*common, "--size", smaller, "--pairs", "24", "--micro", "8", *recompute]),
    ]


def problems(script: str, found: dict, dtype: str) -> list[str]:
    """What is off by more than the dtype's noise."""
    exact = dtype == "float32"
    limits = {
        "max_abs_logprob_diff": FLOAT32_LOGPROBS if exact else max(0.05, NOISE * found.get("noise_floor", 0)),
        "loss_rel_diff": FLOAT32_LOSS if exact else BFLOAT16_LOSS,
    }
    over = [
        f"{script}: {name} is {found[name]:.3g}, more than {limit:.3g}"
        for name, limit in limits.items()
        if name in found and not found[name] <= limit
    ]
    if exact and found.get("share_of_equal_samples", 1.0) < 1:
        over.append(f"{script}: only {found['share_of_equal_samples']:.0%} of the samples are equal")
    return over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="7b")
    options = parser.parse_args()
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    wrong = []
    for script, arguments in checks(options.device, options.size):
        print(f"== speed/{script} {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        run = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments], stdout=subprocess.PIPE, text=True
        )
        print(run.stdout, f"({time.monotonic() - start:.0f} s)", sep="", flush=True)
        if run.returncode:
            wrong.append(f"{script} ended with exit code {run.returncode}")
        else:
            wrong += problems(script, json.loads(run.stdout.splitlines()[-1]), dtype)
    sys.exit("; ".join(wrong) if wrong else None)


if __name__ == "__main__":
    main()
