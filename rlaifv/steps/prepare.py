"""Prepare: read instruction files, check every image, and fix the order in which iterations take instructions."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlaifv.params import PrepareParams, SplitParams
from rlaifv.records import IMAGE_PLACES, Instruction, Reject, parse_json, read_lines, text_of, write_jsonl
from rlaifv.stage import ANNOTATIONS, annotations
from rlaifv.store import check_rejects
from rlaifv.vlm.images import open_image


def parse_instruction(row: Any) -> Instruction:
    """An instruction from our JSONL or from the original's (`ds_question_id`, `image_path`, `metainfos`).

    The original uses the image's path as id, for several questions too: the question is made part of the id. LLaVA's
    `<image>` before or after a question is taken out: the model's own template says where the image goes. Raises
    ValueError for what is no instruction.
    """
    if not isinstance(row, dict):
        raise ValueError(f"is no object with fields: {row!r:.40}")
    original = "ds_question_id" in row
    name = text_of(row, "ds_question_id" if original else "id")
    image_path, asked = text_of(row, "image_path"), text_of(row, "question")
    question = IMAGE_PLACES.sub("", asked)
    if not question.strip():
        raise ValueError("the question is empty")
    if not name.strip():
        raise ValueError("the id is empty")
    if not original:
        return Instruction(name, image_path, question, text_of(row, "reference", ""), text_of(row, "source", ""))
    about = row.get("metainfos") or {}
    if not isinstance(about, dict):
        raise ValueError(f"metainfos is {about!r:.40}, expected an object")
    suffix = hashlib.blake2b(asked.encode(), digest_size=4).hexdigest()
    source = text_of(row, "origin_dataset", text_of(row, "ds_name", ""))
    return Instruction(f"{Path(name).stem}-{suffix}", image_path, question, text_of(about, "reference", ""), source)


def read_instructions(path: Path, image_root: Path) -> tuple[list[Instruction], list[Reject]]:
    """All usable instructions of a file, in its order, and a reject for every other row.

    A row is rejected when it is not JSON, a field is missing or no text, the question is empty, the id was seen
    before, or its image is missing, outside `image_root` or cannot be decoded. Every image is decoded once here, so
    that no later stage meets a broken one.
    """
    kept: list[Instruction] = []
    rejects: list[Reject] = []
    seen: set[str] = set()

    @cache
    def image_problem(name: str) -> str:
        try:
            open_image(inside(image_root, name))
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    for number, line in read_lines(path):
        place = f"{path.name}:{number}"
        try:
            instruction = parse_instruction(parse_json(line))
        except (ValueError, RecursionError) as error:
            rejects.append(Reject(place, "prepare", f"{place}: {error}"))
            continue
        if instruction.id in seen:
            problem = f"the id {instruction.id!r} was used before"
        else:
            problem = image_problem(instruction.image_path)
        if problem:
            rejects.append(Reject(instruction.id, "prepare", f"{place}: {problem}"))
        else:
            kept.append(instruction)
        seen.add(instruction.id)
    return kept, rejects


def inside(folder: Path, name: str) -> Path:
    """The path of a file below a folder; ValueError for one that lies elsewhere, by its name or by a link."""
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):  # the folder may be a link itself
        raise ValueError(f"image {name} lies outside {folder}: put it, or a hard link to it, below prepare.image_root")
    return path


def in_iteration_order(instructions: Sequence[Instruction], seed: int) -> list[Instruction]:
    """A fixed pseudo-random order: iteration k takes rows (k−1)·n … k·n, however many iterations there are."""
    return sorted(instructions, key=lambda i: hashlib.blake2b(f"{seed}/{i.id}".encode(), digest_size=8).digest())


def take_iteration(instructions: Sequence[Instruction], iteration: int, size: int) -> list[Instruction]:
    """The instructions of one iteration (1-based); raises ValueError when the file is too short for it."""
    part = list(instructions[(iteration - 1) * size : iteration * size])
    if len(part) < size:
        raise ValueError(
            f"iteration {iteration} needs instructions {(iteration - 1) * size} to {iteration * size}, but there are "
            f"{len(instructions)}: lower prepare.per_iteration or give a longer prepare.instructions"
        )
    return part


def prepare(params: PrepareParams, seed: int, root: Path, out: Path) -> dict[str, dict[str, int]]:
    """Write `train.jsonl` (in iteration order), `dev.jsonl`, `test.jsonl`, `rejects.jsonl`; return their counts.

    The annotations of dev and test are copied beside them, so that what later stages measure against is tracked.
    """
    files: dict[str, SplitParams | None] = {"train": None, "dev": params.dev, "test": params.test}
    counts: dict[str, dict[str, int]] = {}
    all_rejects: list[Reject] = []
    for name, split in files.items():
        path = root / (split.instructions if split else params.instructions)
        kept, rejects = read_instructions(path, root / params.image_root)
        check_rejects("prepare", rejects, len(kept) + len(rejects), params.max_reject_rate)
        if not kept:
            raise ValueError(f"{path} holds no usable instruction")
        write_jsonl(out / f"{name}.jsonl", in_iteration_order(kept, seed) if name == "train" else kept)
        counts[name] = {"read": len(kept) + len(rejects), "kept": len(kept), "rejected": len(rejects)}
        all_rejects += rejects
        for kind in ANNOTATIONS if split else ():
            copy = annotations(out, name, kind)
            copy.unlink(missing_ok=True)  # DVC may have linked it to its cache; without it, nothing is known
            if source := getattr(split, kind):
                shutil.copyfile(root / source, copy)
    write_jsonl(out / "rejects.jsonl", all_rejects)
    return counts
