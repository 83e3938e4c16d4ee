"""Preference pairs as training sees them: read and tokenized once, by one process, and memory-mapped by all.

A pair is one row of the public RLAIF-V dataset's columns. It is tokenized jointly (prompt, answer and end token in one
text, `chat_format.encode`), so that what is trained is exactly the answer and its end token. A pair that cannot be
used (an answer longer than the context, a broken image) is rejected by its id and never cut.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState

from rlaifv.records import Reject, read_jsonl, write_jsonl
from rlaifv.steps.public_pairs import PAIR, parquet_files, public_rows
from rlaifv.store import progress
from rlaifv.vlm.chat_format import encode
from rlaifv.vlm.images import decode_image
from rlaifv.vlm.loading import VLM

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What some processors say about each prompt token (Gemma3, Qwen-VL); an answer's tokens have type 0."""


@dataclass(frozen=True)
class EncodedPair:
    """One pair as token ids.

    `prompt` [p] is what both rows share; `chosen` and `rejected` are the rest of each row, ending with the end token.
    The first `chosen_start` tokens of `chosen` still belong to the prompt (a template may render its last token
    differently before an answer); likewise `rejected_start`. `image` indexes the image and question that the pair is
    about. `token_types` are the prompt's, for processors that have them.
    """

    pair_id: str
    image: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_start: int
    rejected_start: int
    token_types: dict[str, np.ndarray]

    @cached_property
    def common(self) -> int:
        """How many tokens `chosen` and `rejected` begin with alike: two samples of one model often begin the same."""
        n = min(len(self.chosen), len(self.rejected))
        differ = np.flatnonzero(self.chosen[:n] != self.rejected[:n])
        return int(differ[0]) if len(differ) else n

    @property
    def row_length(self) -> int:
        """Tokens of its packed row: what both answers begin with once, then the rest of each."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected) - self.common


IMAGES = pa.schema({"bytes": pa.binary()})
"""The distinct images."""

PROMPTS = pa.schema({"image": pa.int32(), "question": pa.string(), "pair_id": pa.string()})
"""The distinct questions about an image, each with the first pair that it belongs to."""

PAIRS = pa.schema(
    {
        "row": pa.int32(),  # in the parquet files
        "pair_id": pa.string(),
        "image": pa.int32(),
        **dict.fromkeys(("prompt", "chosen", "rejected"), pa.list_(pa.int32())),
        **dict.fromkeys(("chosen_start", "rejected_start", "row_length"), pa.int32()),
        **dict.fromkeys(TOKEN_TYPES, pa.list_(pa.int8())),  # null where the processor has none
    }
)
"""`EncodedPair`s in the order in which they were tokenized."""


class PairData:
    """All pairs of a file (or of a folder of them), tokenized by `write`, with their images' bytes.

    They lie in Arrow files in `folder`, which the first process of a run writes and every process maps into memory:
    none holds or tokenizes them when it starts, and a run that goes on finds them there. Without a folder they lie in a
    temporary one. `max_length` is the longest row (prompt, image tokens, answer and end token) in tokens; None is the
    model's own limit. Raises what `parquet_files` does.
    """

    def __init__(
        self,
        vlm: VLM,
        path: Path,
        max_length: int | None = None,
        folder: Path | None = None,
        write: Callable[[VLM, Path, int, Path], None] | None = None,
    ):
        self.vlm = vlm
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory()
            folder = Path(self._temporary.name) / "pairs"
        with PartialState().main_process_first():
            if not folder.is_dir():
                (write or write_pairs)(vlm, path, max_length or vlm.context or 1 << 31, folder)
        self.images, self.prompts = open_arrow(folder / "images.arrow"), open_arrow(folder / "prompts.arrow")
        self.pairs = StoredPairs(open_arrow(folder / "pairs.arrow"))
        self.rejects = [Reject(**row) for row in read_jsonl(folder / "rejects.jsonl")]

    def image_inputs(self, image_id: int) -> dict[str, torch.Tensor]:
        """What the processor makes of one image (`pixel_values`, ...), with a batch of one; no token types."""
        number, question, pair_id = (self.prompts[name][image_id].as_py() for name in PROMPTS.names)
        image = decode_image(self.images["bytes"][number].as_py(), f"of pair {pair_id}")
        inputs = encode(self.vlm, image, question).inputs
        return {key: value for key, value in inputs.items() if key not in TOKEN_TYPES}


class StoredPairs(Sequence[EncodedPair]):
    """The pairs of an Arrow table in the order of their rows, each made when it is asked for."""

    def __init__(self, table: pa.Table):
        self.table, self.order = table, np.argsort(table["row"].to_numpy())

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int | slice) -> EncodedPair | list[EncodedPair]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        cells = self.table.slice(self.order[number], 1).combine_chunks()
        # copies: tensors are made of them, which must not share read-only memory
        lists = {name: cells[name][0].values.to_numpy().copy() for name in ("prompt", "chosen", "rejected")}
        types = {name: cells[name][0].values.to_numpy().copy() for name in TOKEN_TYPES if cells[name][0].is_valid}
        others = {name: cells[name][0].as_py() for name in ("pair_id", "image", "chosen_start", "rejected_start")}
        return EncodedPair(**others, **lists, token_types=types)

    @property
    def row_lengths(self) -> np.ndarray:
        """`row_length` of every pair, [pairs]."""
        return self.table["row_length"].to_numpy()[self.order]

    @property
    def ids(self) -> list[str]:
        """`pair_id` of every pair."""
        return self.table["pair_id"].take(self.order).to_pylist()


@dataclass(frozen=True)
class Answers:
    """Two answers to one prompt as text, from a row of the parquet files."""

    row: int
    pair_id: str
    chosen: str
    rejected: str


def write_pairs(vlm: VLM, path: Path, limit: int, folder: Path) -> None:
    """Tokenize the pairs in `path` into the files of `PairData`, all or none of them; a row has `limit` tokens at most.

    Images pass through memory a few at a time; the texts are in it until the end.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rejects: list[Reject] = []
    with arrow_file(partial / "images.arrow", IMAGES) as add_image:
        prompts = by_prompt(path, add_image, rejects)
    images, count = open_arrow(partial / "images.arrow")["bytes"], 0
    with (
        arrow_file(partial / "prompts.arrow", PROMPTS) as add_prompt,
        arrow_file(partial / "pairs.arrow", PAIRS) as add_pair,
    ):
        for (image, question), answers in progress(list(prompts.items()), "tokenize"):
            for pair_id, pairs in encode_prompt(vlm, images[image].as_py(), question, answers, limit, rejects):
                add_prompt({"image": image, "question": question, "pair_id": pair_id})
                for pair in pairs:
                    add_pair({**pair, "image": count})
                count += 1
    write_jsonl(partial / "rejects.jsonl", rejects)
    partial.rename(folder)


def by_prompt(
    path: Path, add_image: Callable[[dict], None], rejects: list[Reject]
) -> dict[tuple[int, str], list[Answers]]:
    """The rows that have two answers to prefer one of, together where they ask the same question about the same image
    bytes: their prompt is encoded once. The key is the image's number, in the order of `add_image`, and the question.
    """
    numbers: dict[bytes, int] = {}
    groups: dict[tuple[int, str], list[Answers]] = {}
    for answers, question, image in read_rows(path):
        if not question:
            rejects.append(Reject(answers.pair_id, "train", "the question is empty"))
        elif not answers.chosen or not answers.rejected:
            empty = "rejected" if answers.chosen else "chosen"
            rejects.append(Reject(answers.pair_id, "train", f"the {empty} answer is empty"))
        elif answers.chosen == answers.rejected:
            rejects.append(Reject(answers.pair_id, "train", "chosen and rejected are the same answer"))
        else:
            key = hashlib.blake2b(image, digest_size=16).digest()
            if key not in numbers:
                numbers[key] = len(numbers)
                add_image({"bytes": image})
            groups.setdefault((numbers[key], question), []).append(answers)
    return groups


def encode_prompt(
    vlm: VLM, image: bytes, question: str, answers: list[Answers], limit: int, rejects: list[Reject]
) -> list[tuple[str, list[dict]]]:
    """The name of a prompt, its first pair, with rows of `PAIRS` of those of its pairs that can be used."""
    name = answers[0].pair_id
    try:
        if not image:
            raise ValueError(f"the image of pair {name} has no bytes")
        texts = [text for pair in answers for text in (pair.chosen, pair.rejected)]
        coded = encode(vlm, decode_image(image, f"of pair {name}"), question, texts)
    except ValueError as error:
        if len(answers) > 1:  # one bad answer must not take the prompt's other pairs with it
            return [done for pair in answers for done in encode_prompt(vlm, image, question, [pair], limit, rejects)]
        rejects.append(Reject(name, "train", str(error)))
        return []
    types = {
        key: value[0].numpy().astype(np.int8)
        for key, value in coded.inputs.items()
        if key in TOKEN_TYPES and value.shape[-1] == len(coded.prompt_ids)
    }
    found = []
    for place, pair in enumerate(answers):
        (a, b), (start_a, start_b) = coded.rows[2 * place : 2 * place + 2], coded.answer_starts[2 * place :][:2]
        if (longest := max(len(a), len(b))) > limit:
            side = "chosen" if len(a) > limit else "rejected"
            reason = f"{side} with its prompt is {longest} tokens, the context holds {limit}"
            rejects.append(Reject(pair.pair_id, "train", reason))
            continue
        shared = min(start_a, start_b)
        encoded = EncodedPair(
            pair_id=pair.pair_id,
            image=0,
            prompt=np.array(a[:shared], np.int32),
            chosen=np.array(a[shared:], np.int32),
            rejected=np.array(b[shared:], np.int32),
            chosen_start=start_a - shared,
            rejected_start=start_b - shared,
            token_types={key: value[:shared] for key, value in types.items()},
        )
        found.append({**vars(encoded), "row": pair.row, "row_length": encoded.row_length, **encoded.token_types})
    return [(name, found)]


def read_rows(path: Path) -> Iterator[tuple[Answers, str, bytes]]:
    """Both answers, the question and the image's bytes of every row, a few rows in memory at a time. A pair's id is the
    row's number and, where there is one, the dataset's own index: `row:idx`."""
    for row, cells in enumerate(public_rows(parquet_files(path), ("image", *PAIR, "idx"))):
        pair_id = str(row) if cells["idx"] is None else f"{row}:{cells['idx']}"
        answers = Answers(row, pair_id, cells["chosen"], cells["rejected"])
        yield answers, cells["question"], (cells["image"] or {}).get("bytes") or b""


@contextmanager
def arrow_file(path: Path, schema: pa.Schema, at_once: int = 64) -> Iterator[Callable[[dict], None]]:
    """A new Arrow file: the block is given what adds a row, so many of which are in memory at a time."""
    rows: list[dict] = []

    def write() -> None:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
        rows.clear()

    def add(row: dict) -> None:
        rows.append(row)
        if len(rows) == at_once:
            write()

    with path.open("wb") as stream:
        with pa.ipc.new_file(stream, schema) as writer:
            yield add
            write()
        stream.flush()
        os.fsync(stream.fileno())


def open_arrow(path: Path) -> pa.Table:
    """The table of an Arrow file, in the file's own bytes: nothing is read before it is asked for."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
