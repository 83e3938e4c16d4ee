"""Preferences between two answers: what a reward model learns from, whoever has preferred them.

Fact-RLHF (arXiv 2309.14525) asked people which of two answers of its model hallucinates less; its file is
LLaVA-Human-Preference-10K. Our own pairs are preferences of the labeler, and the embedded world has annotators whose
taste is known (`tinyworld.annotator`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaifv.records import IMAGE_PLACES, Reject, parse_json
from rlaifv.steps.prepare import inside
from rlaifv.steps.public_pairs import PAIR, parquet_files, problem, public_rows


@dataclass(frozen=True)
class Preference:
    """Two answers to one conversation about an image, of which `chosen` was preferred.

    `conversation` holds what user and model have said in turn, the question last. `kind` is a slice that accuracy is
    also given for (which kind of hallucination one of them has). `facts` is what a reward model may read of the image,
    the same for both answers and in one order.
    """

    id: str
    image_path: str
    conversation: list
    chosen: str
    rejected: str
    kind: str = ""
    facts: list = field(default_factory=list)


def read_preferences(path: Path, image_root: Path) -> tuple[list[Preference], list[Reject]]:
    """The preferences of a file and a reject for every other row: people's as LLaVA-Human-Preference-10K's JSON, pairs
    of ours (or any in the public dataset's columns, with their images below `image_root`) as parquet.

    A row's id is its number and its own id. Rejected are rows that hold no preference and those whose image is missing.
    """
    rows = human_rows(path) if path.suffix == ".json" else pair_rows(path)
    kept, rejects = [], []
    for number, (name, row) in enumerate(rows):
        identity = f"{number}:{name}"
        try:
            found = from_human(identity, row) if path.suffix == ".json" else from_pair(identity, row)
            if not inside(image_root, found.image_path).is_file():
                raise ValueError(f"image {image_root / found.image_path} does not exist")
            kept.append(found)
        except ValueError as error:
            rejects.append(Reject(identity, "preferences", str(error)))
    if not kept:
        first = f": {rejects[0].reason}" if rejects else ""
        raise ValueError(f"{path} holds no usable preference{first}")
    return kept, rejects


def human_rows(path: Path) -> list[tuple[str, Any]]:
    """The rows of LLaVA-Human-Preference-10K's file with their ids."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    return [(str(row.get("id", "")) if isinstance(row, dict) else "", row) for row in rows]


def from_human(identity: str, row: Any) -> Preference:
    """A preference of LLaVA-Human-Preference-10K. Its last turn is the model's, which the two outputs stand in for.

    Raises ValueError for a row that is none.
    """
    try:
        said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        outputs = {1: row["output_1"]["value"], 2: row["output_2"]["value"]}
        preferred, image = row["preference"], row["image"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"is no preference: it lacks {error}") from None
    if said and said[-1][0] == "gpt":
        said = said[:-1]
    if [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2) + ["human"]:
        raise ValueError(f"its turns are of {', '.join(who for who, _ in said)}: expected human and gpt in turn")
    if preferred not in outputs:
        raise ValueError(f"preference is {preferred!r}, expected 1 or 2")
    texts = [*(text for _, text in said), *outputs.values(), image]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a turn, an answer or the image's name is empty or no text")
    if outputs[1] == outputs[2]:
        raise ValueError("both answers are the same")
    conversation = [IMAGE_PLACES.sub("", text) for _, text in said]
    kind = "hallucination" if row.get("hallucination") else "no hallucination"
    return Preference(identity, image, conversation, outputs[preferred], outputs[3 - preferred], kind)


def pair_rows(path: Path) -> list[tuple[str, dict]]:
    """The rows of pairs in the public dataset's columns, without their images' bytes."""
    columns = ("image_path", *PAIR, "idx", "chosen_score", "rejected_score")
    return [(str(row["idx"]), row) for row in public_rows(parquet_files(path), columns)]


def from_pair(identity: str, row: dict) -> Preference:
    """A preference from a pair; its kind is the difference of rejected claims where that is known."""
    if reason := problem(row):
        raise ValueError(reason)
    if not row["image_path"]:
        raise ValueError("it has no image_path")
    scores = row["chosen_score"], row["rejected_score"]
    kind = "" if None in scores else f"{scores[0] - scores[1]} claims apart"
    return Preference(identity, row["image_path"], [row["question"]], row["chosen"], row["rejected"], kind)


def hold_out(preferences: Sequence[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference]]:
    """Preferences to learn from, and about this share of the images to be measured on: no image is in both."""
    held = {image for image in {p.image_path for p in preferences} if held_out(image, share, seed)}
    return [p for p in preferences if p.image_path not in held], [p for p in preferences if p.image_path in held]


def held_out(image_path: str, share: float, seed: int) -> bool:
    """Whether an image is among those that are held out; drawn from (seed, image) alone."""
    drawn = hashlib.blake2b(f"{seed}/{image_path}/held out".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "big") < share * 2**64
