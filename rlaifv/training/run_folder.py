"""The folder of a training run: its lock, its numbered dataset, the checkpoint that it goes on from."""

import fcntl
import json
import shutil
import statistics
from pathlib import Path
from typing import IO

import datasets
from accelerate import PartialState
from datasets import Dataset


def throughput(history: list[dict]) -> dict[str, float | None]:
    """Pairs and tokens per second: the median over the logged steps, None for a run of one step."""
    rates = {}
    for name in ("pairs_per_second", "tokens_per_second"):
        values = [entry[f"throughput/{name}"] for entry in history if f"throughput/{name}" in entry]
        rates[name] = statistics.median(values) if values else None
    return rates


def take_lock(run: Path) -> IO:
    """Keep a second run out of this folder for as long as the file is open; a killed process lets go of it."""
    lock = (run / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RuntimeError(f"another process is training in {run}: wait for it or stop it") from None
    return lock


def numbered(n: int, folder: Path) -> Dataset:
    """What the Trainer iterates over, the numbers of the pairs; on disk, where all processes find TRL's cache."""
    with PartialState().main_process_first():
        if not folder.is_dir():
            Dataset.from_dict({"pair": list(range(n))}).save_to_disk(folder)
    return datasets.load_from_disk(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete Trainer checkpoint; half-written ones (a kill while saving) are deleted."""
    complete = {}
    for path in folder.glob("checkpoint-*"):
        try:
            complete[json.loads((path / "trainer_state.json").read_text())["global_step"]] = path
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return complete[max(complete)] if complete else None
