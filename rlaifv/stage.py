"""What every stage notebook does first and last: find its files, read its parameters, keep its time."""

import json
import logging
import os
import platform
import re
import resource
import sys
import time
import warnings
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import psutil

from rlaifv import ROOT
from rlaifv.fingerprint import LARGE, definition_of, digest, digest_files, stage_definition, stage_sources
from rlaifv.params import Params, ServerParams, load_params
from rlaifv.records import ModelRecord, to_json, write_atomic
from rlaifv.store import SCRATCH, Store, sweep

DATA = ROOT / "data"
RUNS = ROOT / "runs"
PREPARED = DATA / "prepared"
WORLD = DATA / "world"
MODELS = DATA / "models"
REWARD_MODELS = DATA / "reward_models"
EXAM = DATA / "results" / "exam" / "labeler.json"


class Paths:
    """Where an iteration keeps its files; the same layout stands in dvc.yaml."""

    def __init__(self, iteration: str) -> None:
        self.iteration = iteration
        self.folder = DATA / "iterations" / iteration
        self.policy = self.folder / "policy"  # the selected checkpoint (iteration 0: a pointer to the base model)
        self.candidates = self.folder / "candidates" / "candidates.jsonl"
        self.claims = self.folder / "claims" / "claims.jsonl"
        self.judgements = self.folder / "judgements" / "judgements.jsonl"
        self.pairs = self.folder / "pairs" / "pairs.parquet"
        self.checkpoints = self.folder / "checkpoints"
        self.results = DATA / "results" / iteration  # the few small files that the report reads: rlaifv/results.py

    @property
    def trained(self) -> list[Path]:
        """The folders of its trained checkpoints, first to last (of one that was not kept only its row on dev is left,
        beside its folder); iteration 0 has the base model alone."""
        folders = {path.with_suffix("") for path in self.checkpoints.glob("checkpoint-*")}
        return sorted(folders, key=lambda p: int(p.name.split("-")[1])) if self.iteration != "0" else [self.policy]


ANNOTATIONS = {"instances": "json", "captions": "json", "questions": "jsonl"}
"""What may be known of an evaluation split → the ending of its file."""


def annotations(prepared: Path, split: str, kind: str) -> Path:
    """Where a split's annotations lie among the prepared files; absent where the parameter file has null."""
    return prepared / f"{split}_{kind}.{ANNOTATIONS[kind]}"


class UndeclaredParameter(AttributeError):
    """A stage reads a parameter that dvc.yaml does not declare for it: DVC would not run it again for a change."""


class DeclaredParams:
    """The parameters that dvc.yaml declares for a stage, read by name like `Params`; any other is refused.

    A section that is declared whole is the section itself, one of which some keys are declared has only these.
    """

    def __init__(self, params: Any, keys: list[str], stage: str, prefix: str = "") -> None:
        self._params, self._keys, self._stage, self._prefix = params, keys, stage, prefix

    def __getattr__(self, name: str) -> Any:
        value, key = getattr(self._params, name), self._prefix + name
        if key in self._keys:
            return value
        if any(declared.startswith(f"{key}.") for declared in self._keys):
            return DeclaredParams(value, self._keys, self._stage, f"{key}.")
        raise UndeclaredParameter(f"stage {self._stage} reads {key}: add it to the stage's params in dvc.yaml")


class Stage:
    """One run of one stage: its parameters, its files, its clock.

    `name` is the stage's name in dvc.yaml (of iteration 0 it is NAME_base there); `iteration` and `prev` are "" outside
    the loop. `params` holds what dvc.yaml declares for the stage, and nothing else.
    """

    def __init__(self, name: str, params_file: str, iteration: str | int = "", prev: str | int = "") -> None:
        self.name, self.iteration, self.prev = name, str(iteration), str(prev)
        start_logging()
        self._all: Params = load_params(params_file)
        self.definition = definition_of(name, self.iteration)
        self.params = DeclaredParams(self._all, stage_definition(self.definition)["params"], self.definition)
        if self.iteration not in ("", "0"):
            entry = self._all.iterations.get(self.iteration)
            if entry is None:
                raise ValueError(f"{params_file} has no iteration {self.iteration!r}: add it under `iterations:`")
            if self.prev != entry.prev:
                place = f"iteration {self.iteration} of {params_file}"
                raise ValueError(f"{place} starts from prev={entry.prev}, not {self.prev!r}")
        self.paths, self.prev_paths = Paths(self.iteration), Paths(self.prev)
        sweep(SCRATCH, name)

    @property
    def label(self) -> str:
        return f"{self.name}@{self.iteration}" if self.iteration else self.name

    def key(self) -> dict[str, object]:
        """All that the stage's outputs depend on, as dvc.yaml lists it: declared parameters, code, data and models."""
        definition = stage_definition(self.definition)
        values = {key: attrgetter(key)(self._all) for key in definition["params"]}
        deps = [self._fill(dep) for dep in definition["deps"] if not dep.startswith(("rlaifv/", "notebooks/"))]
        images = self._all.prepare.image_root
        data = {dep: digest_files(ROOT / dep, by_stat_from=0 if dep == images else LARGE) for dep in deps}
        return {"params": digest(values), "source": stage_sources(self.definition), "data": data}

    def _fill(self, dep: str) -> str:
        """A dependency with its `${…}` filled in as DVC does."""
        known = {"key": self.iteration, "item.prev": self.prev}
        return re.sub(r"\$\{([\w.]+)\}", lambda m: known.get(m[1]) or str(attrgetter(m[1])(self._all)), dep)

    def store(self, part: str = "") -> Store:
        """The store of this run's unfinished work, keyed by `key`; `part` names one of several."""
        return Store(f"{self.label}{part and '-' + part}", self.key(), SCRATCH, self._all.cluster)

    @property
    def server(self) -> ServerParams:
        """How models behind a server are asked. As with `cluster`, no output depends on it: dvc.yaml does not name it,
        and nothing is begun anew when it changes."""
        return self._all.server

    def model(self, role: str) -> ModelRecord:
        """Who plays a role in this run, as the stage `models` wrote it; FileNotFoundError when it has not run."""
        path = MODELS / f"{role}.json"
        if not path.is_file():
            raise FileNotFoundError(f"no {path.relative_to(ROOT)} yet: run the stage models (dvc repro)")
        return ModelRecord(**json.loads(path.read_text()))

    def finish(self, peak_gpu_gb: float = 0.0, part: str = "") -> None:
        """Record wall time and peak memory (outside `data/`: they differ from run to run) and show the session.

        `part` names one of several runs of a stage. `peak_gpu_gb` is the largest of a GPU by processes that the stage
        started; this process's own is looked up.
        """
        minutes = (time.time() - psutil.Process().create_time()) / 60  # imports count: a user waits for them
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 * (1 if sys.platform != "darwin" else 2**-10)
        label = f"{self.label}{part and '-' + part}"
        record = {"stage": label, "minutes": round(minutes, 3), "peak_memory_gb": round(peak, 2)}
        if peak_gpu := max(peak_gpu_gb, gpu_peak()):
            record["peak_gpu_gb"] = round(peak_gpu, 2)
        record["policy"] = self._all.policy.path  # whose times these are: another profile's say nothing of them
        write_atomic(RUNS / "timings" / f"{label}.json", to_json(record) + "\n")
        versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "trl", "peft", "datasets", "dvc"))
        on_gpu = f", {peak_gpu:.2f} GB on a GPU" if peak_gpu else ""
        print(f"{label}: {minutes:.2f} minutes, peak memory {peak:.2f} GB{on_gpu}")
        print(f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores; {versions}")


def gpu_peak() -> float:
    """The most memory in GB that this process has held at once on any of its GPUs, what PyTorch kept in reserve
    included; 0 where it used none."""
    torch = sys.modules.get("torch")  # a stage without models does not import it
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return max(torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count())) / 2**30


def start_logging() -> None:
    """Log lines to the notebook's output; the libraries' own chatter only from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("rlaifv").setLevel(logging.INFO)
    # PEFT 0.21 reads a name that transformers 5.23 has renamed
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
