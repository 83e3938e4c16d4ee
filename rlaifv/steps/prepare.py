"""Prepare: read instruction files, check every image, and fix the order in which iterations take instructions."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from rlaifv.params import PrepareParams, SplitParams
from rlaifv.records import Instruction, Reject, read_jsonl, write_jsonl
from rlaifv.stage import ANNOTATIONS, annotations
from rlaifv.store import check_rejects
from rlaifv.vlm.images import open_image


def parse_instruction(row: dict[str, Any]) -> Instruction:
    """An instruction from our JSONL or from the original's (`ds_question_id`, `image_path`, `metainfos`).

    The original uses the image's path as id, for several questions too: the question is made part of the id.
    Raises KeyError for a field that is missing or null.
    """
    row = {key: value for key, value in row.items() if value is not None}
    if "ds_question_id" in row:
        question = str(row.get("question", ""))
        suffix = hashlib.blake2b(question.encode(), digest_size=4).hexdigest()
        name = Path(str(row["ds_question_id"])).stem
        reference = str(row.get("metainfos", {}).get("reference", ""))
        source = str(row.get("origin_dataset", row.get("ds_name", "")))
        return Instruction(f"{name}-{suffix}", str(row["image_path"]), question, reference, source)
    row = {"reference": "", "source": ""} | row
    return Instruction(**{field.name: str(row[field.name]) for field in fields(Instruction)})


def read_instructions(path: Path, image_root: Path) -> tuple[list[Instruction], list[Reject]]:
    """All usable instructions of a file, in its order, and a reject for every other row.

    A row is rejected when a field is missing, the question is empty, the id was seen before, or its image is
    missing or cannot be decoded. Every image is decoded once here, so that no later stage meets a broken one.
    """
    kept: list[Instruction] = []
    rejects: list[Reject] = []
    seen: set[str] = set()

    @cache
    def image_problem(name: str) -> str:
        try:
            open_image(image_root / name)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    for number, row in enumerate(read_jsonl(path), start=1):
        place = f"{path.name}:{number}"
        if not isinstance(row, dict):
            rejects.append(Reject(place, "prepare", f"{place} is no object with fields: {str(row)[:40]}"))
            continue
        try:
            instruction = parse_instruction(row)
        except KeyError as error:
            rejects.append(Reject(place, "prepare", f"{place} has no field {error}"))
            continue
        if instruction.id in seen:
            problem = f"the id {instruction.id!r} was used before"
        elif not instruction.question.strip():
            problem = "the question is empty"
        else:
            problem = image_problem(instruction.image_path)
        if problem:
            rejects.append(Reject(instruction.id, "prepare", f"{place}: {problem}"))
        else:
            kept.append(instruction)
        seen.add(instruction.id)
    return kept, rejects


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
            if source := getattr(split, kind):
                copy = annotations(out, name, kind)
                copy.unlink(missing_ok=True)  # DVC may have linked it to its cache
                shutil.copyfile(root / source, copy)
    write_jsonl(out / "rejects.jsonl", all_rejects)
    return counts
