"""Small training runs that several test files make and compare."""

import csv
import hashlib
from pathlib import Path

import pytest
from tiny_llava import save_pairs, save_tiny_llava

from rlaifv.params import TrainParams
from rlaifv.training.job import TrainResult, train

PARAMS = TrainParams(
    dtype="float32", learning_rate=1e-3, epochs=2, batch_size=4, micro_batch_size=2, checkpoints_per_epoch=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    save_tiny_llava(folder / "model")
    save_pairs(folder / "pairs.parquet", 13)
    return folder


def run(folder: Path, name: str, params: TrainParams = PARAMS, pairs: str = "pairs.parquet") -> TrainResult:
    return train(
        str(folder / "model"), folder / pairs, params, folder / name / "out", folder / name / "scratch", seed=3
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def log_rows(result: TrainResult) -> list[dict[str, float]]:
    with open(result.log) as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
