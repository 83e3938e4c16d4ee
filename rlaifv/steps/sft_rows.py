"""Conversations to fine-tune on before preferences: LLaVA-RLHF's SFT+ mixture (Fact-RLHF, arXiv 2309.14525, section 3).

LLaVA-Instruct teaches to talk; yes/no questions of VQA-v2, A-OKVQA's choices with their reasons and Flickr30k's short
captions teach to be right about the picture. Each reader takes the data set's own files; the wording of questions
around them is ours. Two more take this project's own: instructions with references, and yes/no questions.
"""

import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaifv.params import SftPart
from rlaifv.records import IMAGE_PLACES, Reject, parse_json, read_lines, text_of
from rlaifv.steps.prepare import inside, parse_instruction

CAPTION_REQUEST = "List what people say who look at this picture, one short caption a line."
YES_NO = "Please answer yes or no."
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class SftRow:
    """What user and model say in turn about an image, the user first, the model last: its answers are learned."""

    id: str
    image_path: str
    conversation: list
    source: str

    def image(self, root: Path) -> Path:
        """Its image below `root`; ValueError for one elsewhere."""
        return inside(root, self.image_path)


def llava_instruct(path: Path) -> tuple[list[SftRow], list[Reject]]:
    """LLaVA-Instruct's JSON: rows of `id`, `image`, `conversations`; all turns are kept."""
    kept, rejects = [], []
    for number, row in enumerate(read_json(path)):
        identity = f"llava-{number}:{row.get('id', '') if isinstance(row, dict) else ''}"
        try:
            turns = row["conversations"]
            if not turns or [t["from"] for t in turns] != ["human", "gpt"] * (len(turns) // 2):
                raise ValueError("its turns are not of human and gpt in turn, the last of gpt")
            texts = [IMAGE_PLACES.sub("", turn["value"]) for turn in turns]
            if not all(text.strip() for text in texts):
                raise ValueError("a turn is empty")
            kept.append(SftRow(identity, row["image"], texts, "llava"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            rejects.append(Reject(identity, "sft", problem(error)))
    return kept, rejects


def vqa_yes_no(questions: Path, annotations: Path) -> tuple[list[SftRow], list[Reject]]:
    """The yes/no questions of VQA-v2's two files; its other questions are left out."""
    asked, known = read_json(questions), read_json(annotations)
    texts = {row["question_id"]: row["question"] for row in asked["questions"]}
    kept, rejects = [], []
    for row in known["annotations"]:
        identity, answer = f"vqa-{row['question_id']}", row["multiple_choice_answer"]
        if row["answer_type"] != "yes/no":
            continue
        if answer not in ("yes", "no") or row["question_id"] not in texts:
            rejects.append(Reject(identity, "sft", f"the answer is {answer!r}, or the question is in another file"))
            continue
        image = f"COCO_{asked['data_subtype']}_{row['image_id']:012d}.jpg"
        kept.append(SftRow(identity, image, [texts[row["question_id"]], f"{answer.capitalize()}."], "vqa"))
    return kept, rejects


def a_okvqa(path: Path, rationale: bool = True) -> tuple[list[SftRow], list[Reject]]:
    """A-OKVQA's JSON: a question with its choices, answered by a reason (its first rationale) and the right letter."""
    kept, rejects = [], []
    for row in read_json(path):
        identity = f"aokvqa-{row.get('question_id', '')}"
        try:
            choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
            answer = f"The correct option is {LETTERS[row['correct_choice_idx']]}."
            if rationale:
                reason = row["rationales"][0].strip()
                answer = f"{reason}{'' if reason.endswith('.') else '.'} {answer}"
            asked = f"{row['question'].strip()}\n{choices}"
            kept.append(SftRow(identity, f"{row['image_id']:012d}.jpg", [asked, answer], "aokvqa"))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            rejects.append(Reject(identity, "sft", problem(error)))
    return kept, rejects


def flickr30k(path: Path) -> tuple[list[SftRow], list[Reject]]:
    """Flickr30k's training images in Karpathy's JSON: the captions of an image as a list."""
    kept = []
    for row in read_json(path)["images"]:
        if row["split"] == "train":
            captions = [sentence["raw"].strip() for sentence in row["sentences"]]
            kept.append(
                SftRow(f"flickr-{row['filename']}", row["filename"], [CAPTION_REQUEST, "\n".join(captions)], "flickr")
            )
    return kept, []


def instructions(path: Path) -> tuple[list[SftRow], list[Reject]]:
    """Instructions as `prepare` takes them (JSONL, this project's or the original's): the reference is the answer."""
    kept, rejects = [], []
    for number, line in read_lines(path):
        place = f"{path.name}:{number}"
        try:
            row = parse_instruction(parse_json(line))
            if not row.reference.strip():
                raise ValueError("has no reference, which would be the answer")
            kept.append(SftRow(row.id, row.image_path, [row.question, row.reference], "instructions"))
        except ValueError as error:
            rejects.append(Reject(place, "sft", str(error)))
    return kept, rejects


def questions(path: Path) -> tuple[list[SftRow], list[Reject]]:
    """Yes/no questions with answers, as `prepare.dev.questions` has them (JSONL)."""
    kept, rejects = [], []
    for number, line in read_lines(path):
        place = f"{path.name}:{number}"
        try:
            row = parse_json(line)
            name, image, asked, answer = (text_of(row, key) for key in ("id", "image_path", "question", "answer"))
            if answer not in ("yes", "no"):
                raise ValueError(f"the answer is yes or no, got {answer!r:.40}")
            turns = [f"{IMAGE_PLACES.sub('', asked)} {YES_NO}", answer.capitalize()]
            kept.append(SftRow(name, image, turns, "questions"))
        except (AttributeError, ValueError) as error:
            rejects.append(Reject(place, "sft", str(error)))
    return kept, rejects


READERS = {
    reader.__name__: reader for reader in (llava_instruct, vqa_yes_no, a_okvqa, flickr30k, instructions, questions)
}
"""`kind` of a part in params.yaml → what reads its files."""


def read_parts(parts: Mapping[str, SftPart], root: Path) -> tuple[dict[str, list[SftRow]], list[Reject]]:
    """The rows of every part of a mixture, whose files' paths start at `root`, and what of them cannot be used. The
    part's name is the rows' `source` and begins their ids.

    Raises FileNotFoundError or ValueError that names the file.
    """
    found, rejects = {}, []
    for name, part in parts.items():
        if absent := next((file for file in part.files if not (root / file).is_file()), None):
            raise FileNotFoundError(f"no file {absent} (sft_parts.{name}.files)")
        rows, lost = READERS[part.kind](*(root / file for file in part.files))
        named = {row.id: row for row in rows}
        if len(named) < len(rows):
            twice = next(row.id for k, row in enumerate(rows) if named[row.id] is not rows[k])
            raise ValueError(f"{part.files[0]}: the id {twice!r} is there twice (sft_parts.{name})")
        rejects += [Reject(f"{name}/{reject.id}", "sft", reject.reason) for reject in lost]
        found[name] = [
            dataclasses.replace(
                row, id=f"{name}/{row.id}", image_path=str(Path(part.images, row.image_path)), source=name
            )
            for row in rows
        ]
    return found, rejects


def mixture(parts: Mapping[str, Sequence[SftRow]], weights: Mapping[str, float], rows: int, seed: int) -> list[SftRow]:
    """So many rows, of which each part has its share of the weights, drawn without replacement and shuffled.

    What is drawn of a part depends on (seed, part) and its rows alone. Raises ValueError for a part with fewer rows
    than its share, and for weights of other parts.
    """
    if parts.keys() != weights.keys() or not sum(weights.values()) > 0 or min(weights.values()) < 0:
        raise ValueError(f"weights of {', '.join(weights)} for parts {', '.join(parts)}: expected one above 0 for each")
    taken: list[SftRow] = []
    for name, part in parts.items():
        count = round(rows * weights[name] / sum(weights.values()))
        if count > len(part):
            raise ValueError(
                f"{name} has {len(part)} rows, its weight asks for {count} of {rows}: lower the weight or the rows"
            )
        taken += _random(seed, name).sample(list(part), count)
    _random(seed, "order").shuffle(taken)
    return taken


def _random(seed: int, name: str) -> random.Random:
    return random.Random(hashlib.blake2b(f"{seed}/{name}/sft".encode()).digest())


def read_json(path: Path) -> Any:
    """The content of a JSON file; an error names it."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def problem(error: Exception) -> str:
    """Why a row cannot be read."""
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
