"""Who plays a role of the method, wherever that model runs: in this process, behind a server's address, or behind a
server that is started for it."""

import contextlib
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rlaifv.inference.engine import start_engine
from rlaifv.inference.sampling import Decoding, sample_encoded, uniforms
from rlaifv.inference.served import Sampled, Served, data_url, kept_answers, open_served, sample_served
from rlaifv.inference.server import is_served
from rlaifv.params import ServerParams
from rlaifv.records import ModelRecord
from rlaifv.store import SCRATCH
from rlaifv.vlm.chat_format import EncodedPrompt, Reader, encode_questions
from rlaifv.vlm.checkpoint import find_checkpoint, fingerprint_checkpoint
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM, check_unchanged, load_model, load_reader, source

Model = VLM | Served

SERVABLE = SCRATCH / "servable"
"""Checkpoints as a server reads them: the weights' own files, with the settings that are not in them."""

NOT_TEXT = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
"""Files of a checkpoint that no setting changes."""


def load_role(model: ModelRecord, server: ServerParams, folder: Path | None = None) -> Model:
    """The model that plays a role in this run; `folder` is read in its place (a policy of an earlier iteration).

    `server` says how one behind a server is asked, and started where its engine is vllm: then it runs until `close`.

    Raises:
        FileNotFoundError, ValueError: as `load_model` does, also for a server's model that is not the one that the
            stage `models` found.
        NoReply, ServerRefused, EngineFailed: it cannot be asked.
    """
    if is_served(model.path):
        served = open_served(model.path, server, SCRATCH)
        if served.fingerprint != model.fingerprint:
            raise ValueError(
                f"{served.server.who} answers otherwise than when the stage models asked it: run `dvc repro -f models`"
            )
        return served
    return start_served(model, server, folder) if model.engine == "vllm" else load_model(model, folder)


def start_served(model: ModelRecord, server: ServerParams, folder: Path | None) -> Served:
    """`load_role` for a model whose engine is vllm: a server of our own that shows the model the prompts and the images
    that it would be shown in this process."""
    path, revision, settings = source(model, folder)
    place, settings = find_checkpoint(path, revision, settings)
    fingerprint = fingerprint_checkpoint(path, revision, settings)
    check_unchanged(model, folder, fingerprint)
    reader = load_reader(path, revision, settings)
    engine = start_engine(servable(place, reader, fingerprint) if settings else place, path, model.dtype, server)
    answers = kept_answers(SCRATCH, f"{fingerprint}-{model.dtype}")
    return Served(path, fingerprint, engine.asked_by(server), answers, reader, engine.close)


def servable(place: Path, reader: Reader, fingerprint: str) -> Path:
    """A folder that holds a checkpoint with its settings: weights by link, processor and chat template as they are
    used here."""
    folder = SERVABLE / fingerprint
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}.partial")
        (reader.processor or reader.tokenizer).save_pretrained(partial)
        for file in (file for pattern in NOT_TEXT for file in place.glob(pattern)):
            (partial / file.name).symlink_to(file.resolve())
        with contextlib.suppress(OSError):  # another process was faster
            partial.rename(folder)
    return folder


def look(model: Model, path: Path) -> Image.Image | str:
    """An image file as a model takes it: its pixels in this process, for a server the file itself (a data URL).

    Raises FileNotFoundError or ValueError as `open_image` does.
    """
    return data_url(path) if isinstance(model, Served) else open_image(path)


# ---- sampled answers


@dataclass(frozen=True)
class OpenQuestion:
    """A question about an image file, or about none. `name` is what its random numbers belong to."""

    name: str
    text: str
    image: Path | None = None


def draw_answers(
    model: Model, asked: Sequence[OpenQuestion], samples: Sequence[int], seed: int, decoding: Decoding
) -> list[list[Sampled] | OSError | ValueError]:
    """Sample answers to several questions, by whoever plays the role.

    Args:
        model: who answers.
        asked: the questions.
        samples: numbers of the samples of each question. The random numbers of a sample are those of (seed, name of
            the question, number): neither batch size nor order nor the other samples change it. A server draws with a
            seed that is made of the same three.
        seed: of all.
        decoding: how the tokens are chosen.

    Returns:
        For each question an answer for each number, or why there is none: its image cannot be read, it holds a special
        token, or the context has no room for it and an answer (UnfitText).
    """
    results: dict[int, list[Sampled] | OSError | ValueError] = {}
    ready: list[tuple[int, EncodedPrompt | str | None]] = []
    for place, question in enumerate(asked):
        try:
            image = look(model, question.image) if question.image else None
            if not isinstance(model, Served):
                image = encode_questions(model, image, [question.text], room=decoding.max_new_tokens)
            ready.append((place, image))
        except (OSError, ValueError) as error:
            results[place] = error
    if isinstance(model, Served):
        questions = [(image, asked[place].text) for place, image in ready]
        seeds = [[seed_of(seed, asked[place].name, sample) for sample in samples] for place, _ in ready]
        drawn = sample_served(model, questions, seeds, decoding)
    else:
        steps = decoding.max_new_tokens
        streams = [np.stack([uniforms(seed, asked[place].name, s, steps) for s in samples]) for place, _ in ready]
        drawn = [
            [Sampled(answer.text, len(answer.token_ids), answer.finish_reason) for answer in row]
            for row in sample_encoded(model, [encoded for _, encoded in ready], streams, decoding)
        ]
    results |= {place: row for (place, _), row in zip(ready, drawn, strict=True)}
    return [results[place] for place in range(len(asked))]


def seed_of(seed: int, name: str, sample: int) -> int:
    """The seed of a sample that a server draws: 63 bits, for some read it as a signed number."""
    digest = hashlib.blake2b(f"{seed}/{name}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
