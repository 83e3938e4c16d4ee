"""Write the embedded world in the formats of real data: COCO annotation JSON, PNG images, instruction JSONL."""

import json
import random
from pathlib import Path

from rlaifv.records import write_atomic
from rlaifv.tinyworld.language import INSTRUCTIONS, TYPES, caption, random_claim, to_question
from rlaifv.tinyworld.scenes import CELL, CONTEXTS, GRID, SIZE, Group, Scene, make_scene, place, render

COCO_IDS: dict[str, int] = {
    "bicycle": 2, "car": 3, "motorcycle": 4, "bus": 6, "train": 7, "truck": 8, "bird": 16, "cat": 17, "dog": 18,
    "horse": 19, "sheep": 20, "cow": 21, "bottle": 44, "cup": 47, "fork": 48, "knife": 49, "spoon": 50, "bowl": 51,
    "chair": 62, "laptop": 73, "mouse": 74, "keyboard": 76, "book": 84, "clock": 85,
}  # fmt: skip
"""The real COCO category ids of this world's classes."""

_SUPERCATEGORY = {"kitchen": "kitchen", "street": "vehicle", "animals": "animal", "study": "indoor"}
_CATEGORIES = sorted(
    (
        {"id": COCO_IDS[name], "name": name, "supercategory": _SUPERCATEGORY[context]}
        for context, names in CONTEXTS.items()
        for name in names
    ),
    key=lambda category: category["id"],
)


def write_world(folder: Path, seed: int = 0, train: int = 1600, dev: int = 150, test: int = 300) -> None:
    """Write images/ and, for each split, instances_{split}.json, captions_{split}.json, instructions_{split}.jsonl and
    questions_{split}.jsonl into `folder`. The same arguments write the same bytes.

    A scene whose groups were drawn before is skipped, so no two images, and so no two splits, show the same scene.
    Raises ValueError for a negative size.
    """
    sizes = {"train": train, "dev": dev, "test": test}
    if min(sizes.values()) < 0:
        raise ValueError(f"write_world: sizes {sizes} must not be negative")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    image_id, seen = 0, set()
    for split, size in sizes.items():
        scenes = []
        while len(scenes) < size:
            image_id += 1
            scene = make_scene(seed, image_id)
            if scene.groups not in seen:
                seen.add(scene.groups)
                scenes.append(scene)
        _write_split(folder, split, scenes, seed)


def file_name(image_id: int) -> str:
    """The COCO-like name of an image, relative to images/."""
    return f"{image_id:012d}.png"


def _write_split(folder: Path, split: str, scenes: list[Scene], seed: int) -> None:
    images, annotations, captions, instructions = [], [], [], []
    for scene in scenes:
        rng = random.Random(f"text {seed} {scene.image_id}")
        name = file_name(scene.image_id)
        (folder / "images" / name).unlink(missing_ok=True)  # DVC may have linked it to its cache
        render(scene, seed).save(folder / "images" / name)
        images.append({"id": scene.image_id, "file_name": name, "height": SIZE, "width": SIZE})
        annotations += _annotations(scene, seed, len(annotations))
        for _ in range(5):
            text = caption(scene.groups, rng, opinion=0.0)
            captions.append({"id": len(captions) + 1, "image_id": scene.image_id, "caption": text})
        instructions.append(
            {
                "id": f"{split}-{scene.image_id:06d}",
                "image_path": name,
                "question": rng.choice(INSTRUCTIONS),
                "reference": caption(scene.groups, rng, opinion=0.0),
                "source": "tinyworld",
            }
        )
    info = {"description": f"RLAIF-V embedded world, split {split}, seed {seed}", "version": "1.0"}
    instances = {"info": info, "images": images, "annotations": annotations, "categories": _CATEGORIES}
    _write_json(folder / f"instances_{split}.json", instances)
    _write_json(folder / f"captions_{split}.json", {"info": info, "images": images, "annotations": captions})
    _write_jsonl(folder / f"instructions_{split}.jsonl", instructions)
    _write_jsonl(folder / f"questions_{split}.jsonl", held_out_questions(scenes, split, seed))


def _annotations(scene: Scene, seed: int, written: int) -> list[dict]:
    """COCO instance annotations of a scene, one per object; `color` is this world's addition to the format."""
    rows = []
    for number, (group, icon, left, top) in enumerate(place(scene, seed), start=written + 1):
        x0, y0, x1, y1 = icon.getbbox()
        mask = icon.getchannel("A").histogram()
        rows.append(
            {
                "id": number,
                "image_id": scene.image_id,
                "category_id": COCO_IDS[group.name],
                "bbox": [left + x0, top + y0, x1 - x0, y1 - y0],
                "area": sum(mask[128:]),
                "iscrowd": 0,
                "color": group.color,
            }
        )
    return rows


def read_scenes(instances: Path) -> dict[int, Scene]:
    """The scenes of an instances_{split}.json by image id, for judging claims with language.is_true."""
    data = json.loads(Path(instances).read_text())
    names = {category["id"]: category["name"] for category in data["categories"]}
    objects: dict[int, dict[tuple[int, str, str], int]] = {image["id"]: {} for image in data["images"]}
    for row in data["annotations"]:
        x, y, width, height = row["bbox"]
        cell = int((y + height / 2) // CELL) * GRID + int((x + width / 2) // CELL)
        counts = objects[row["image_id"]]
        key = (cell, names[row["category_id"]], row["color"])
        counts[key] = counts.get(key, 0) + 1
    contexts = {name: context for context, in_context in CONTEXTS.items() for name in in_context}
    scenes = {}
    for image_id, counts in objects.items():
        groups = tuple(Group(name, color, count, cell) for (cell, name, color), count in sorted(counts.items()))
        scenes[image_id] = Scene(image_id, contexts[groups[0].name], groups)
    return scenes


def held_out_questions(scenes: list[Scene], split: str, seed: int) -> list[dict]:
    """Up to one yes/no question of each type per scene; each type has as many yes as no (or one more)."""
    rows, n_yes = [], dict.fromkeys(TYPES, 0)
    n_no = dict(n_yes)
    for scene in scenes:
        rng = random.Random(f"questions {seed} {scene.image_id}")
        for kind in TYPES:
            yes = n_yes[kind] < n_no[kind] or (n_yes[kind] == n_no[kind] and rng.random() < 0.5)
            claim = random_claim(scene, kind, yes, rng)
            if claim is None:  # no plural here: the next scene that has one restores the balance
                continue
            (n_yes if yes else n_no)[kind] += 1
            rows.append(
                {
                    "id": f"{split}-{scene.image_id:06d}-{kind}",
                    "image_path": file_name(scene.image_id),
                    "question": to_question(claim),
                    "answer": "yes" if yes else "no",
                    "type": kind,
                    "claim": claim,
                }
            )
    return rows


def _write_json(path: Path, value: dict) -> None:
    write_atomic(path, json.dumps(value, indent=None, separators=(",", ":")) + "\n")


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
