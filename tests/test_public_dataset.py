"""The public dataset's columns, one key and one command: preferences that somebody else has made are trained on,
chosen by dev, tested and reported, and no feedback is run."""

import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import copy_repository, run

from rlaifv.records import read_jsonl
from rlaifv.run import FEEDBACK

PUBLISHED = pa.schema(
    [
        ("ds_name", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *((name, pa.string()) for name in ("question", "chosen", "rejected", "origin_dataset", "origin_split")),
        *((name, pa.string()) for name in ("idx", "image_path")),
    ]
)
"""As the dataset's card has it; its idx is a text, ours a number."""


def published(world: Path, name: str, rows: list[dict]) -> dict:
    """A row in the published columns about an instruction of the embedded world; the rejected answer adds an object."""
    row = rows.pop()
    picture = (world / "images" / row["image_path"]).read_bytes()
    return {
        "ds_name": "RLAIF-V",
        "image": {"bytes": picture, "path": row["image_path"]},
        "question": row["question"],
        "chosen": row["reference"],
        "rejected": f"{row['reference']} There is a pink keyboard at the top of the picture.",
        "origin_dataset": "VQAv2",
        "origin_split": json.dumps({"model": "some-7b", "type": "detailed description"}),
        "idx": name,
        "image_path": row["image_path"],
    }


def small(content) -> None:
    content["iterations"].pop("2")
    content["world"].update(train=24, dev=3, test=3)
    content["prepare"].update(per_iteration=12)
    content["pairs"].update(source="data/public")
    content["train"].update(epochs=1, checkpoints_per_epoch=1)
    content["report"].update(gallery=1)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository with the world drawn and three files of pairs: as published, as older releases have it, and with
    rows that nothing can be learned from."""
    folder = copy_repository(tmp_path_factory.mktemp("public") / "checkout", small)
    (folder / "metrics").mkdir()
    for name in ("ablations.json", "rounds.json"):
        (folder / "metrics" / name).write_text('{"experiments": [], "tests": {}, "failed": []}')
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    run(folder, "dvc", "init", "-q")
    run(folder, "rlaifv.run", "00_world")
    world = folder / "data" / "world"
    rows = read_jsonl(world / "instructions_train.jsonl")
    (folder / "data" / "public").mkdir()
    new = [published(world, str(i), rows) for i in range(8)]
    bad = [published(world, str(i), rows) for i in range(4)]
    bad[0]["rejected"] = bad[0]["chosen"]
    bad[1]["question"] = None
    bad[2]["image"] = {"bytes": b"no image", "path": "x"}
    old = [published(world, str(i), rows) for i in range(4)]
    for row in old:
        row["text"] = json.dumps({name: row.pop(name) for name in ("question", "chosen", "rejected")})
    for name, table in (("0", new), ("1", bad)):
        pq.write_table(pa.Table.from_pylist(table, PUBLISHED), folder / "data" / "public" / f"{name}.parquet")
    pq.write_table(pa.Table.from_pylist(old), folder / "data" / "public" / "2.parquet")
    return folder


def test_from_files_of_pairs_to_the_report_in_one_command(checkout):
    said = run(checkout, "dvc", "repro", timeout=1800)
    for notebook in FEEDBACK:
        assert f"{notebook}: nothing to do: the pairs come from pairs.source = data/public" in said
    iteration = checkout / "data" / "iterations" / "1"
    left = [file.name for name in ("candidates", "claims", "judgements") for file in (iteration / name).iterdir()]
    assert left == ["left_out.txt"] * 3
    pairs = json.loads((iteration / "pairs" / "statistics.json").read_text())
    assert pairs["pairs"] == 14 and sum(pairs["rejects"].values()) == 2, "of the texts: 16 rows = 14 + 2"
    assert pairs["rejects"] == {"chosen and rejected are the same answer": 1, "question is empty": 1}
    assert pairs["made_by"] == {"model: some-7b": 14, "type: detailed description": 14}
    assert "16 pairs = 13 trained + 3 rejects" in said, "and one more for its image"
    assert not list(iteration.rglob("*.parquet")), "14 GB of pairs stay where they are"
    summary = json.loads((checkout / "metrics" / "summary.json").read_text())
    assert list(summary["iterations"]) == ["1"] and summary["iterations"]["1"]["n"] == 3
    html = (checkout / "plots" / "report.html").read_text()
    assert "What was planned, and what it took" in html and "<td>train</td>" in html and "<td>divide</td>" not in html
