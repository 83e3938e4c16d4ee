"""What every stage notebook does first and last: find its files, read its parameters, keep its time."""

import json
import logging
import os
import platform
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rlaifv import ROOT
from rlaifv.fingerprint import digest, digest_files, digest_modules
from rlaifv.params import Params, load_params
from rlaifv.records import write_atomic

DATA = ROOT / "data"
RUNS = ROOT / "runs"
ANSWERING = ("images.py", "prefill.py", "prefix.py", "processors.py", "rows.py", "sampling.py", "vlm.py")
"""The modules that everything which a model says runs through."""


@dataclass(frozen=True)
class Paths:
    """Where an iteration keeps its files; the same layout stands in dvc.yaml."""

    iteration: str

    @property
    def folder(self) -> Path:
        return DATA / "iterations" / self.iteration

    @property
    def policy(self) -> Path:
        """The selected checkpoint (iteration 0: a pointer to the base model)."""
        return self.folder / "policy"

    @property
    def candidates(self) -> Path:
        return self.folder / "candidates" / "candidates.jsonl"

    @property
    def claims(self) -> Path:
        return self.folder / "claims" / "claims.jsonl"

    @property
    def judgements(self) -> Path:
        return self.folder / "judgements" / "judgements.jsonl"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs" / "pairs.parquet"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def results(self) -> Path:
        """The few small files of an iteration that the report reads."""
        return DATA / "results" / self.iteration


PREPARED = DATA / "prepared"
WORLD = DATA / "world"


class Stage:
    """One run of one stage: its parameters, its files, its clock.

    `name` is the stage's section in the parameter file; `iteration` and `prev` are "" outside the loop.
    """

    def __init__(self, name: str, params_file: str, iteration: str | int = "", prev: str | int = "") -> None:
        self.name, self.iteration, self.prev = name, str(iteration), str(prev)
        start_logging()
        self.params: Params = load_params(params_file)
        if self.iteration and self.iteration != "0" and self.iteration not in self.params.iterations:
            raise ValueError(f"{params_file} has no iteration {self.iteration!r}: add it under `iterations:`")
        if self.iteration in self.params.iterations and self.prev != self.params.iterations[self.iteration].prev:
            expected = self.params.iterations[self.iteration].prev
            raise ValueError(
                f"iteration {self.iteration} of {params_file} starts from prev={expected}, not {self.prev!r}"
            )
        self.paths, self.prev_paths = Paths(self.iteration), Paths(self.prev)

    @property
    def label(self) -> str:
        return f"{self.name}@{self.iteration}" if self.iteration else self.name

    def key(self, *inputs: Path, modules: tuple[str, ...], **extra: object) -> dict[str, object]:
        """The scratch key: the stage's parameters and seed, its input files' bytes, its source.

        Args:
            modules: the files below rlaifv/ that decide what the work comes to, beside those of `ANSWERING`;
                tests/test_notebooks.py knows when one is missing.
        """
        return {
            "params": digest(getattr(self.params, self.name, None)),
            "seed": self.params.seed,
            "inputs": digest_files(*inputs),
            "source": digest_modules(*modules, *ANSWERING),
            **extra,
        }

    def finish(self) -> None:
        """Record wall time and peak memory (outside `data/`: they differ from run to run) and show the session."""
        minutes = (time.time() - process_start()) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 * (1 if sys.platform != "darwin" else 2**-10)
        record = {"stage": self.label, "minutes": round(minutes, 3), "peak_memory_gb": round(peak, 2)}
        write_atomic(RUNS / "timings" / f"{self.label}.json", json.dumps(record) + "\n")
        versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "trl", "peft", "datasets", "dvc"))
        print(f"{self.label}: {minutes:.2f} minutes, peak memory {peak:.2f} GB")
        print(f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores; {versions}")


def start_logging() -> None:
    """Log lines to the notebook's output; the libraries' own chatter only from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("rlaifv").setLevel(logging.INFO)
    # TRL 1.16 reads names that transformers 5.23 has renamed, hundreds of times a run
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def process_start() -> float:
    """When this process began, in seconds since the epoch: imports count as time a user waits."""
    import psutil

    return psutil.Process().create_time()
