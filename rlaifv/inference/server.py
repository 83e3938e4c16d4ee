"""A labeler behind an OpenAI-compatible server (vLLM, SGLang, …): `http://host:8000/v1#model` in place of a folder.

The question goes with the image (a base64 data URL) to the chat endpoint, one token is asked for, and p_yes and p_no
are read off its `top_logprobs`. Each answer is on disk before the next is awaited, so a run that was stopped, or whose
server died, goes on and asks nothing twice. The key comes from the environment and is stored nowhere.
"""

import base64
import hashlib
import io
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

log = logging.getLogger(__name__)

YES_WORDS, NO_WORDS = ("Yes", "yes"), ("No", "no")

TOP_LOGPROBS = 20
"""The most that OpenAI's interface gives; a word that is not among them counts as probability 0."""


class ServerGone(RuntimeError):
    """The server does not answer any more; what it answered before is kept."""


class ServerRefused(ValueError):
    """The server answers, but not as a labeler must: a wrong key, an unknown model, no log-probs."""


def is_served(path: str) -> bool:
    """Whether a model path of the parameter file is a server's address."""
    return path.startswith(("http://", "https://"))


@dataclass(frozen=True)
class ServedLabeler:
    """A model behind a server.

    Attributes:
        url, model: the server's base address (ending in /v1) and the model's name there.
        name, fingerprint: stored with every judgement. Nobody can fingerprint weights that are elsewhere: it covers
            address and name only.
        cache: JSON-lines file of answers, made when absent and only appended to; None keeps them in memory.
        concurrency: requests in flight.
        tries: how often a request is sent when it times out, or the server answers 429 or 5xx or is not there; the
            pauses between grow from half a second to eight.
        timeout: seconds for one try.
        key_variable: environment variable with the key; local servers need none.
    """

    url: str
    model: str
    cache: Path | None = None
    concurrency: int = 16
    tries: int = 5
    timeout: float = 120.0
    key_variable: str = "OPENAI_API_KEY"
    _answers: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.url}#{self.model}"

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.name.encode(), digest_size=8).hexdigest()


def open_served(path: str, cache: Path | None = None, **options: Any) -> ServedLabeler:
    """The labeler of a path such as `http://127.0.0.1:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct`.

    Args:
        path: address and model.
        cache: where answers are kept; a folder, or None.
        options: `concurrency`, `tries`, `timeout`, `key_variable` of `ServedLabeler`.

    Raises:
        ValueError: the path names no model.
    """
    url, _, model = path.partition("#")
    if not is_served(path) or not model:
        raise ValueError(f"{path!r} is no served model: write http://HOST:PORT/v1#MODEL")
    labeler = ServedLabeler(url.rstrip("/"), model, **options)
    if cache is None:
        return labeler
    file = cache / f"served-{labeler.fingerprint}.jsonl"
    labeler = ServedLabeler(labeler.url, model, file, **options)
    labeler._answers.update(read_answers(file))
    if labeler._answers:
        log.info("%s: %d answers of an earlier run are kept in %s", labeler.name, len(labeler._answers), file)
    return labeler


def read_answers(file: Path) -> dict[str, tuple[float, float]]:
    """Answers by key; a line that a killed process left half written is asked for again."""
    answers = {}
    if file.exists():
        text = file.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                row = json.loads(line)
                answers[row["key"]] = (row["p_yes"], row["p_no"])
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            with file.open("a", encoding="utf-8") as stream:
                stream.write("\n")
    return answers


def judge_served(
    labeler: ServedLabeler, items: Sequence[tuple[Image.Image, Sequence[str]]]
) -> list[list[tuple[float, float]]]:
    """`yes_no.judge_many` for a served labeler: (p_yes, p_no) per question, each distinct question asked once.

    Raises:
        ServerGone: after `tries` attempts at one request; no more are started.
        ServerRefused: a wrong key or model, or a server that gives no `top_logprobs`.
    """
    images = [data_url(image) for image, _ in items]
    keys = [
        [answer_key(url, question) for question in questions] for url, (_, questions) in zip(images, items, strict=True)
    ]
    waiting: dict[str, tuple[str, str]] = {}
    for url, row, (_, questions) in zip(images, keys, items, strict=True):
        waiting |= {k: (url, q) for k, q in zip(row, questions, strict=True) if k not in labeler._answers}
    if waiting:
        ask_server(labeler, waiting)
    return [[labeler._answers[key] for key in row] for row in keys]


def ask_server(labeler: ServedLabeler, waiting: dict[str, tuple[str, str]]) -> None:
    """Ask (image, question) pairs, some at a time, and keep every answer as it comes."""
    import openai

    client = openai.OpenAI(
        api_key=os.environ.get(labeler.key_variable) or "none",
        base_url=labeler.url,
        timeout=labeler.timeout,
        max_retries=labeler.tries - 1,
    )
    lock, stop = threading.Lock(), threading.Event()
    if labeler.cache is not None:
        labeler.cache.parent.mkdir(parents=True, exist_ok=True)

    def ask_one(key: str, image: str, question: str) -> None:
        if stop.is_set():
            return
        try:
            answer = read_probabilities(labeler, complete(labeler, client, image, question))
        except BaseException:
            stop.set()
            raise
        with lock:
            labeler._answers[key] = answer
            if labeler.cache is not None:
                with labeler.cache.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"key": key, "p_yes": answer[0], "p_no": answer[1]}) + "\n")

    with ThreadPoolExecutor(labeler.concurrency) as pool:
        futures = [pool.submit(ask_one, key, *request) for key, request in waiting.items()]
        for future in futures:
            future.add_done_callback(lambda f: f.exception() and pool.shutdown(wait=False, cancel_futures=True))
    failures = [f.exception() for f in futures if not f.cancelled() and f.exception()]
    if failures:
        raise failures[0]


def complete(labeler: ServedLabeler, client: Any, image: str, question: str) -> Any:
    """One request; every way in which it can fail becomes one clear line."""
    import openai

    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    try:
        # temperature 1: some servers report log-probs after dividing by it
        return client.chat.completions.create(
            model=labeler.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=1,
            temperature=1.0,
            logprobs=True,
            top_logprobs=TOP_LOGPROBS,
        )
    except openai.APIStatusError as error:
        reason = f"HTTP {error.status_code}: {' '.join(str(error.message).split())[:200]}"
        if error.status_code < 500 and error.status_code not in (408, 409, 429):
            raise ServerRefused(f"the labeler {labeler.name} refuses, {reason}") from None
    except openai.OpenAIError as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ServerGone(
        f"the labeler {labeler.name} does not answer after {labeler.tries} tries ({reason}); "
        "its answers so far are kept: start the server and run the stage again"
    )


def read_probabilities(labeler: ServedLabeler, response: Any) -> tuple[float, float]:
    """p_yes and p_no of a chat completion: the words' spellings with and without a space before them are added up."""
    try:
        top = response.choices[0].logprobs.content[0].top_logprobs
    except (AttributeError, IndexError, TypeError):
        top = None
    if not top:
        raise ServerRefused(
            f"the labeler {labeler.name} gives no top_logprobs, so P(yes) and P(no) cannot be read: "
            "use a server that does (vLLM, SGLang) or load the model in this process"
        )
    return mass(top, YES_WORDS), mass(top, NO_WORDS)


def mass(top: Iterable[Any], words: Sequence[str]) -> float:
    """Total probability of the tokens that spell one of `words` (distinct tokens may be spelled alike)."""
    return min(1.0, sum(math.exp(entry.logprob) for entry in top if entry.token.strip(" ▁Ġ\n") in words))


def data_url(image: Image.Image) -> str:
    """The image as a lossless data URL: the server sees the pixels that an in-process labeler would."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def answer_key(image: str, question: str) -> str:
    return hashlib.blake2b(f"{image}\0{question}".encode(), digest_size=16).hexdigest()
