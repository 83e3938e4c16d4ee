"""A conversation with a vision-language model about one image, greedy, sampled, by beams, or the best of N answers."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import TextStreamer
from transformers.generation import BaseStreamer

from rlaifv import ROOT
from rlaifv.chat import BASE_MODEL
from rlaifv.inference.logprobs import continuation_logprobs
from rlaifv.inference.sampling import Decoding, Generation, generate, sample_encoded, sample_plain, uniforms
from rlaifv.steps.self_feedback import AnswerLogps, best_of_n, check_same_tokens
from rlaifv.vlm.chat_format import EncodedPrompt, expand_image, render, turn
from rlaifv.vlm.images import decode_image, open_image, refused, upright_rgb
from rlaifv.vlm.loading import VLM, load_vlm

BEST_OF_TEMPERATURE = 0.7
"""Of the N answers when no temperature is given: greedy ones would be N times the same."""


def default_model() -> str:
    """The policy of the newest finished iteration, else the shipped tiny policy; relative to the repository."""
    found = [file.parent for file in ROOT.glob("data/iterations/*/policy/config.json")]
    newest = max((p for p in found if p.parent.name.isdigit()), key=lambda p: int(p.parent.name), default=None)
    return str(newest.relative_to(ROOT)) if newest else BASE_MODEL


def read_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """An RGB image from a path, the bytes of an image file, or a PIL image.

    Raises FileNotFoundError for a path without a file, ValueError for what is no image; both name it.
    """
    if isinstance(source, Image.Image):
        if problem := refused(source):
            raise ValueError(f"the image {problem}")
        return upright_rgb(source)
    if isinstance(source, bytes):
        return decode_image(source, "given as bytes")
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"image {path} is a folder: give an image file")
    return open_image(path)


def load_chat_model(path: str, device: str = "auto") -> VLM:
    """Load a vision-language model from a folder of the working directory or the repository, or a hub id.

    Raises FileNotFoundError where there is none, ValueError for a model that sees no images.
    """
    return load_vlm(local_first(path), device=device, dtype=None, must_see=True)


def local_first(model: str) -> str:
    """The absolute path of a folder of the working directory; anything else (of the repository, a hub id) as it is."""
    local = Path(model).expanduser().resolve()
    return str(local) if local.is_dir() else model


@dataclass
class Chat:
    """A conversation about one image.

        chat = Chat(load_chat_model("models/tiny/policy"), read_image("cat.jpg"))
        print(chat.ask("What is in the picture?"))
        chat.ask("Is there a dog?", Aloud(chat.vlm.tokenizer, skip_prompt=True))  # prints it as it grows

    `history` holds (question, answer) of the turns so far. Temperature 0 is greedy. `reference` is π_ref for best-of-N.
    """

    vlm: VLM
    image: Image.Image | None
    reference: VLM | None = None
    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0
    repetition_penalty: float = 1.0
    beams: int = 1
    history: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, question: str, streamer: BaseStreamer | None = None) -> str:
        """The whole answer, which joins the history; `streamer` is told of its tokens as they are decoded. With several
        `beams` it is the likeliest that a search finds, and no streamer is told."""
        if self.beams > 1:
            search = {"num_beams": self.beams, "do_sample": False, "length_penalty": 1.0, "early_stopping": False}
            search |= {"repetition_penalty": self.repetition_penalty}
            (row,) = generate(self.vlm, [self.encode(question)], self.max_new_tokens, **search)
            said = self.vlm.tokenizer.decode(row, skip_special_tokens=True).strip()
            self.history.append((question, said))
            return said
        numbers, decoding = self.random_numbers(1), self.decoding(self.temperature)
        (said,) = sample_plain(self.vlm, self.encode(question), numbers, decoding, streamer)
        self.history.append((question, said.text.strip()))
        return said.text.strip()

    def ask_best(self, question: str, n: int) -> tuple[str, list[tuple[float, str]]]:
        """The answer with the highest normalized reward of `n`, and all distinct (log-ratio per token, answer)."""
        if n < 1:
            raise ValueError(f"best of {n}: give at least 1")
        if self.reference is None:
            raise ValueError("best-of-N needs a reference: the model that this one was aligned from")
        check_same_tokens(self.vlm, self.reference)
        encoded = self.encode(question)
        decoding = self.decoding(self.temperature or BEST_OF_TEMPERATURE)
        (drawn,) = sample_encoded(self.vlm, [encoded], [self.random_numbers(n)], decoding)
        samples = list({s.text.strip(): s for s in drawn if s.text.strip()}.values())
        if not samples:
            raise ValueError(f"{self.vlm.name} gave {n} empty answers")
        scored = self.score(encoded, samples)
        answers = [(s.reward(beta=1.0), sample.text.strip()) for s, sample in zip(scored, samples, strict=True)]
        best = answers[best_of_n(scored, beta=1.0)][1]  # β scales all rewards alike
        self.history.append((question, best))
        return best, sorted(answers, reverse=True)

    def score(self, encoded: EncodedPrompt, samples: list[Generation]) -> list[AnswerLogps]:
        """Log-probs of sampled answers under the model and the reference, over the very tokens that were drawn."""
        start, end = len(encoded.prompt_ids), self.vlm.tokenizer.eos_token_id
        rows = [encoded.prompt_ids + s.token_ids + [end] * (s.finish_reason == "stop") for s in samples]
        answered = EncodedPrompt(encoded.prompt_ids, rows, [start] * len(rows), encoded.inputs)
        ours, theirs = (continuation_logprobs(vlm, [answered])[0] for vlm in (self.vlm, self.reference))
        return [AnswerLogps(a.sum().item(), b.sum().item(), len(a)) for a, b in zip(ours, theirs, strict=True)]

    def encode(self, question: str) -> EncodedPrompt:
        """The conversation so far and the new question, by the checkpoint's own template, image expanded."""
        if not question.strip():
            raise ValueError("the question is empty")
        turns = []
        for number, (asked, answer) in enumerate([*self.history, (question, None)]):
            turns.append(turn(self.vlm, "user", asked, image=self.image is not None and number == 0))
            if answer is not None:
                turns.append(turn(self.vlm, "assistant", answer))
        ids, inputs = expand_image(self.vlm, self.image, render(self.vlm, turns, add_generation_prompt=True))
        return EncodedPrompt(ids, [ids], [len(ids)], inputs)

    def decoding(self, temperature: float) -> Decoding:
        if not temperature >= 0:
            raise ValueError(f"temperature {temperature:g}: give 0 (greedy) or more")
        return Decoding(temperature, 50, 1.0, self.max_new_tokens, self.repetition_penalty)

    def random_numbers(self, n: int) -> np.ndarray:
        """(n, max_new_tokens) numbers that belong to this turn."""
        turn = f"chat/{len(self.history)}"
        return np.stack([uniforms(self.seed, turn, s, self.max_new_tokens) for s in range(n)])


class Aloud(TextStreamer):
    """Prints an answer as it grows, from its first word on."""

    begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or text != ""
        super().on_finalized_text(text, stream_end)
