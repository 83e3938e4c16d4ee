"""Preference pairs as training sees them: read, tokenized once, and turned into batches.

A pair is one row of the public RLAIF-V dataset's columns. It is tokenized jointly (prompt, answer and end token in one
text, `chat_format.encode`), so that what is trained is exactly the answer and its end token. A pair that cannot be
used (an answer longer than the context, a broken image) is rejected by its id and never cut.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlaifv.records import Reject, json_object
from rlaifv.store import progress
from rlaifv.vlm.chat_format import encode
from rlaifv.vlm.images import decode_image
from rlaifv.vlm.loading import VLM

COLUMNS = ("image", "question", "chosen", "rejected")
"""The columns that training needs; `idx` and `ds_name` name the row where they exist."""

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


class PairData:
    """All pairs of a parquet file (or of a folder of them), tokenized; image bytes stay in the memory-mapped table.

    `max_length` is the longest row (prompt, image tokens, answer and end token) in tokens; None is the model's own
    limit. Raises what `read_pairs` does.
    """

    def __init__(self, vlm: VLM, path: Path, max_length: int | None = None):
        self.vlm = vlm
        self.table = read_pairs(path)
        self.rejects: list[Reject] = []
        self.prompts: list[tuple[int, str]] = []  # (row that holds the image bytes, question) of each distinct prompt
        positions = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
        encoded: dict[int, EncodedPair] = {}
        for rows in progress(self._by_prompt(), "tokenize"):
            encoded |= self._encode_prompt(rows, max_length or positions or 1 << 31)
        self.pairs = [encoded[row] for row in sorted(encoded)]

    def _by_prompt(self) -> list[list[int]]:
        """Rows that have two answers to prefer one of, together where they ask the same question about the same image
        bytes: their prompt is encoded once."""
        groups: dict[tuple[bytes, str], list[int]] = {}
        texts = zip(*(self.table[name].to_pylist() for name in ("question", "chosen", "rejected")), strict=True)
        for row, (question, chosen, rejected) in enumerate(texts):
            if not question:
                self._reject(row, "the question is empty")
            elif not chosen or not rejected:
                self._reject(row, f"the {'rejected' if chosen else 'chosen'} answer is empty")
            elif chosen == rejected:
                self._reject(row, "chosen and rejected are the same answer")
            else:
                data = self.table["image"][row].as_py()["bytes"] or b""
                groups.setdefault((hashlib.blake2b(data, digest_size=16).digest(), question), []).append(row)
        return list(groups.values())

    def _encode_prompt(self, rows: list[int], limit: int) -> dict[int, EncodedPair]:
        """The pairs of one prompt by their rows, those rejected left out."""
        question = self.table["question"][rows[0]].as_py()
        try:
            answers = [self.table[side][row].as_py() for row in rows for side in ("chosen", "rejected")]
            coded = encode(self.vlm, self._image(rows[0]), question, answers)
        except ValueError as error:
            if len(rows) > 1:  # one bad answer must not take the prompt's other pairs with it
                return {k: pair for row in rows for k, pair in self._encode_prompt([row], limit).items()}
            self._reject(rows[0], str(error))
            return {}
        self.prompts.append((rows[0], question))
        types = {
            key: value[0].numpy().astype(np.int8)
            for key, value in coded.inputs.items()
            if key in TOKEN_TYPES and value.shape[-1] == len(coded.prompt_ids)
        }
        found = {}
        for place, row in enumerate(rows):
            (a, b), (start_a, start_b) = coded.rows[2 * place : 2 * place + 2], coded.answer_starts[2 * place :][:2]
            if max(len(a), len(b)) > limit:
                name = "chosen" if len(a) > limit else "rejected"
                self._reject(row, f"{name} with its prompt is {max(len(a), len(b))} tokens, the context holds {limit}")
                continue
            shared = min(start_a, start_b)
            found[row] = EncodedPair(
                pair_id=self.pair_id(row),
                image=len(self.prompts) - 1,
                prompt=np.array(a[:shared], np.int32),
                chosen=np.array(a[shared:], np.int32),
                rejected=np.array(b[shared:], np.int32),
                chosen_start=start_a - shared,
                rejected_start=start_b - shared,
                token_types={key: value[:shared] for key, value in types.items()},
            )
        return found

    def _reject(self, row: int, reason: str) -> None:
        self.rejects.append(Reject(self.pair_id(row), "train", reason))

    def pair_id(self, row: int) -> str:
        """`row:idx`: the row's number and the dataset's own index."""
        return f"{row}:{self.table['idx'][row].as_py()}" if "idx" in self.table.column_names else str(row)

    def _image(self, row: int):
        cell = self.table["image"][row].as_py()
        if not cell["bytes"]:
            raise ValueError(f"the image of pair {self.pair_id(row)} has no bytes")
        return decode_image(cell["bytes"], f"of pair {self.pair_id(row)}")

    def image_inputs(self, image_id: int) -> dict[str, torch.Tensor]:
        """What the processor makes of one image (`pixel_values`, ...), with a batch of one; no token types."""
        row, question = self.prompts[image_id]
        inputs = encode(self.vlm, self._image(row), question).inputs
        return {key: value for key, value in inputs.items() if key not in TOKEN_TYPES}


def read_pairs(path: Path) -> pa.Table:
    """The pairs as an Arrow table. `path` is a parquet file or a folder of them (the public RLAIF-V dataset's files, in
    order of name). Raises FileNotFoundError where there is none, ValueError naming a column that is missing."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no parquet file of preference pairs at {path}")
    tables = []
    for file in files:
        names = pq.read_schema(file).names
        if missing := [name for name in COLUMNS if name not in names and (name == "image" or "text" not in names)]:
            raise ValueError(f"{file} has no column {', '.join(missing)}; its columns are {', '.join(names)}")
        columns = [name for name in (*COLUMNS, "idx", "text") if name in names]
        tables.append(unpack_text(pq.read_table(file, columns=columns, memory_map=True)))
    return pa.concat_tables(tables, promote_options="permissive")


def unpack_text(table: pa.Table) -> pa.Table:
    """The table with question, chosen and rejected as columns, which older releases keep as JSON in `text`."""
    if "text" not in table.column_names:
        return table
    rows = [json_object(text) for text in table["text"].to_pylist()]
    for name in COLUMNS[1:]:
        if name not in table.column_names:
            table = table.append_column(name, pa.array([row.get(name) for row in rows], pa.string()))
    return table.drop_columns("text")
