"""Eight rows of a profile's own data for its rehearsal; where they are not there yet, drawn scenes in their place.

What is drawn is the embedded world's (`rlaifv.tinyworld`), stretched to the shape of a photo.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rlaifv import ROOT
from rlaifv.records import read_jsonl, write_jsonl
from rlaifv.stage import ANNOTATIONS
from rlaifv.steps.pairs import SCHEMA
from rlaifv.steps.prepare import parse_instruction
from rlaifv.tinyworld.coco import write_world

ROWS = 8
"""Instructions to train on; half as many of dev and of test."""

PHOTO = (640, 480)
"""Pixels of a usual photo; what a prompt's image tokens are counted for."""

DRAWN = (320, 240)
"""Pixels of a drawn picture: half a photo each way, of which some processors make a quarter of the tokens."""

FOLDER = "data/rehearsal"


def write_data(content: dict[str, Any], root: Path) -> list[str]:
    """Write the data of a rehearsal below `root`/data/rehearsal, and make the parameters in `content` name it.

    Returns what is drawn (train, dev, test, pairs). FileNotFoundError names a file of the profile's data that is
    missing although the instructions that go with it are there.
    """
    folder, prepare, drawn = root / FOLDER, content["prepare"], []
    write_world(folder, train=ROWS, dev=ROWS // 2, test=ROWS // 2)
    for path in (folder / "images").iterdir():
        Image.open(path).resize(DRAWN).save(path)
    for split in ("train", "dev", "test"):
        section = prepare if split == "train" else prepare[split]
        if (ROOT / section["instructions"]).is_file():
            images = ROOT / (section.get("image_root") or prepare["image_root"])
            take_own(section, split, images, folder, ROWS if split == "train" else ROWS // 2)
        else:
            drawn.append(split)
            stretch(folder / f"instances_{split}.json")
    for split in ("train", "dev", "test"):
        section = prepare if split == "train" else prepare[split]
        section["instructions"] = f"{FOLDER}/instructions_{split}.jsonl"
        section |= {kind: f"{FOLDER}/{kind}_{split}.{end}" for kind, end in ANNOTATIONS.items() if section.get(kind)}
        if section.get("image_root"):
            section["image_root"] = f"{FOLDER}/images"
    if source := content["pairs"].get("source"):
        drawn += write_pairs(ROOT / source, folder / "pairs.parquet")
        content["pairs"]["source"] = f"{FOLDER}/pairs.parquet"
    return drawn


def take_own(section: dict[str, Any], split: str, images: Path, folder: Path, rows: int) -> None:
    """The first rows of a split's instructions, their images, and what is known of these."""
    own = read_jsonl(ROOT / section["instructions"])[:rows]
    write_jsonl(folder / f"instructions_{split}.jsonl", own)
    names = {parse_instruction(row).image_path for row in own}
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / name, folder / "images" / name)
    for kind in ("instances", "captions"):
        if section.get(kind):
            known = of_images(json.loads((ROOT / section[kind]).read_text()), {Path(name).name for name in names})
            (folder / f"{kind}_{split}.json").write_text(json.dumps(known))
    if section.get("questions"):
        asked = [row for row in read_jsonl(ROOT / section["questions"]) if row["image_path"] in names]
        write_jsonl(folder / f"questions_{split}.jsonl", asked)


def of_images(coco: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """COCO annotations of these images alone."""
    images = [image for image in coco["images"] if image["file_name"] in names]
    ids = {image["id"] for image in images}
    return coco | {"images": images, "annotations": [row for row in coco["annotations"] if row["image_id"] in ids]}


def stretch(instances: Path) -> None:
    """Make COCO annotations fit the images' new size."""
    coco = json.loads(instances.read_text())
    factors = [DRAWN[axis] / coco["images"][0][key] for axis, key in enumerate(("width", "height"))]
    for image in coco["images"]:
        image["width"], image["height"] = DRAWN
    for row in coco["annotations"]:
        row["bbox"] = [value * factor for value, factor in zip(row["bbox"], 2 * factors, strict=True)]
        row["area"] *= factors[0] * factors[1]
    instances.write_text(json.dumps(coco))


def write_pairs(source: Path, out: Path) -> list[str]:
    """The first pairs of a dataset in the public columns, or pairs about the drawn images where it is not there; says
    so as `write_data` does."""
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if files and files[0].is_file():
        pq.write_table(pa.Table.from_batches([next(pq.ParquetFile(files[0]).iter_batches(batch_size=ROWS))]), out)
        return []
    rows = read_jsonl(out.with_name("instructions_train.jsonl"))
    pairs = [drawn_pair(number, row, out.with_name("images")) for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(pairs, SCHEMA), out)
    return ["pairs"]


def drawn_pair(number: int, row: dict[str, Any], images: Path) -> dict[str, Any]:
    """A pair in the public dataset's columns: what is in the picture against what is not."""
    instruction = parse_instruction(row)
    image = {"bytes": (images / instruction.image_path).read_bytes(), "path": instruction.image_path}
    return {
        "ds_name": "rehearsal",
        "image": image,
        "question": instruction.question,
        "chosen": instruction.reference or "A picture.",
        "rejected": "There is a kite at the top of the picture.",
        "origin_dataset": instruction.source,
        "origin_split": json.dumps({"model": "drawn"}),
        "idx": str(number),
        "image_path": instruction.image_path,
        "chosen_score": 0,
        "rejected_score": -1,
    }
