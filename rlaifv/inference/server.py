"""Models behind an OpenAI-compatible server (vLLM, SGLang, …): a labeler's P(yes), and what a benchmark's judge says.

A labeler is named by `http://host:8000/v1#model` in place of a folder. The question goes with the image (a base64 data
URL) to the chat endpoint, one token is asked for, and p_yes and p_no are read off its `top_logprobs`. Each answer is on
disk as soon as it came, so a run that was stopped, or whose server died, goes on and asks nothing twice. The key comes
from the environment and is stored nowhere.
"""

import base64
import hashlib
import io
import json
import logging
import math
import os
import threading
from collections import defaultdict
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


class NoReply(RuntimeError):
    """No reply to one request; the message says why. What came before is kept."""


class ServerRefused(ValueError):
    """The server answers, but not as it must: a wrong key, an unknown model, a request that it cannot take."""


class Server:
    """A model at an OpenAI-compatible address, and whether it still serves.

    Once it refuses everybody (`refusal`), or after `give_up_after` requests in a row without a reply, nothing more is
    sent.

    Args:
        who: how messages name it.
        model: its name there.
        base_url: such as http://localhost:8000/v1; None is OpenAI's, or the environment's OPENAI_BASE_URL.
        tries: how often a request is sent when it times out, or the server answers 429 or 5xx or is not there; the
            pauses between grow from half a second to eight.
        timeout: seconds for one try.
        key_variable: environment variable with the key; local servers need none.
    """

    def __init__(
        self,
        who: str,
        model: str,
        base_url: str | None,
        tries: int,
        timeout: float,
        key_variable: str,
        give_up_after: int = 1,
    ):
        import openai

        key = os.environ.get(key_variable) or "none"
        self.client = openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=tries - 1)
        self.who, self.model, self.tries, self.give_up_after = who, model, tries, give_up_after
        self.refusal, self.failures, self.last = "", 0, ""

    def complete(self, messages: list[dict], **options: Any) -> Any:
        """The choice of one chat completion; every way in which it can fail becomes one clear line.

        Raises:
            NoReply: none after all tries, or the server was given up before.
            ServerRefused: HTTP 4xx, for this request or (401, 403, 404) for all.
        """
        import openai

        if self.refusal:
            raise ServerRefused(self.refusal)
        if self.failures >= self.give_up_after:
            raise NoReply(f"not asked after {self.failures} failures in a row, the last: {self.last}")
        try:
            choice = self.client.chat.completions.create(model=self.model, messages=messages, **options).choices[0]
            _ = choice.message.content  # where there is none, this is no chat completion
        except openai.APIStatusError as error:
            reason = f"HTTP {error.status_code}: {' '.join(str(error.message).split())[:200]}"
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                if error.status_code in (401, 403, 404):
                    self.refusal = f"{self.who} answers {reason}"
                raise ServerRefused(f"{self.who} answers {reason}") from None
        except openai.OpenAIError as error:  # no connection, or no reply in time
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        except (AttributeError, IndexError, TypeError, ValueError):
            reason = "no chat completion: is this an OpenAI-compatible address?"
        else:
            self.failures = 0
            return choice
        self.failures, self.last = self.failures + 1, reason
        raise NoReply(f"{self.who} does not answer after {self.tries} tries ({reason})")


class ReplyCache:
    """Replies by what was asked, in a JSON-lines file that is only appended to; without a path, in memory alone.

    Args:
        path: made when absent.
        key: the fields of a line that say what was asked; "reply" holds the reply.
        kind: the type of a reply; a line without one (a process was killed while it wrote) counts as not there.
    """

    def __init__(self, path: str | Path | None, key: Sequence[str], kind: type):
        self.path, self.key = Path(path) if path else None, key
        self._replies: dict[tuple, list] = defaultdict(list)
        self._lock = threading.Lock()
        if self.path is None:
            return
        if self.path.is_dir():
            raise ValueError(f"the file of replies {self.path} is a folder: give a file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        damaged = 0
        for line in filter(bytes.strip, data.split(b"\n")):
            try:
                row = json.loads(line)
                asked, reply = self._asked(row), row["reply"]
            except (ValueError, KeyError, TypeError):
                reply = None
            if isinstance(reply, kind):
                self._replies[asked].append(reply)
            else:
                damaged += 1
        if damaged:
            log.warning("%s: %d lines hold no reply; what they answered is asked again", self.path, damaged)
        if self._replies:
            log.info("%s: %d replies of earlier runs are kept", self.path, sum(map(len, self._replies.values())))
        if data and not data.endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def _asked(self, row: dict) -> tuple:
        return tuple(row[name] for name in self.key)

    def replies(self, *asked: Any) -> list:
        """All replies to what was asked, oldest first."""
        return self._replies.get(asked, [])

    def add(self, reply: Any, **row: Any) -> None:
        """Keep a reply, on disk before this returns; `row` holds the key and whatever else a reader may want."""
        with self._lock:
            self._replies[self._asked(row)].append(reply)
            if self.path:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**row, "reply": reply}, ensure_ascii=False) + "\n")


def is_served(path: str) -> bool:
    """Whether a model path of the parameter file is a server's address."""
    return path.startswith(("http://", "https://"))


@dataclass(frozen=True)
class ServedLabeler:
    """A labeler behind a server.

    Attributes:
        name, fingerprint: stored with every judgement. Nobody can fingerprint weights that are elsewhere: it covers
            address and name only.
        server: whom to ask.
        answers: [p_yes, p_no] by `answer_key`.
        concurrency: requests in flight.
    """

    name: str
    fingerprint: str
    server: Server = field(repr=False)
    answers: ReplyCache = field(repr=False)
    concurrency: int


def open_served(path: str, folder: Path | None = None, concurrency: int = 16, tries: int = 5) -> ServedLabeler:
    """The labeler of a path such as `http://127.0.0.1:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct`.

    Args:
        path: address (ending in /v1) and model.
        folder: where its answers are kept; None keeps them in memory.
        concurrency: requests in flight.
        tries: of `Server`.

    Raises:
        ValueError: the path names no model.
    """
    url, _, model = path.partition("#")
    if not is_served(path) or not model:
        raise ValueError(f"{path!r} is no served model: write http://HOST:PORT/v1#MODEL")
    url = url.rstrip("/")
    name = f"{url}#{model}"
    fingerprint = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    answers = ReplyCache(folder / f"served-{fingerprint}.jsonl" if folder else None, ("key",), list)
    server = Server(f"the labeler {name}", model, url, tries, timeout=120.0, key_variable="OPENAI_API_KEY")
    return ServedLabeler(name, fingerprint, server, answers, concurrency)


def judge_served(
    labeler: ServedLabeler, items: Sequence[tuple[Image.Image, Sequence[str]]]
) -> list[list[tuple[float, float]]]:
    """`yes_no.judge_many` for a served labeler: (p_yes, p_no) per question, each distinct question asked once, some at
    a time; every answer is kept as it comes.

    Raises:
        NoReply: after `tries` attempts at one request; no more are started.
        ServerRefused: a wrong key or model, or a server that gives no `top_logprobs`.
    """
    keys, requests = [], {}
    for image, questions in items:
        url = data_url(image)
        keys.append([answer_key(url, question) for question in questions])
        requests |= {key: (url, question) for key, question in zip(keys[-1], questions, strict=True)}

    def ask(key: str) -> None:
        url, question = requests[key]
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        # temperature 1: some servers report log-probs after dividing by it
        options = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        choice = labeler.server.complete([{"role": "user", "content": content}], **options)
        labeler.answers.add(read_probabilities(labeler, choice), key=key)

    try:
        with ThreadPoolExecutor(labeler.concurrency) as pool:
            list(pool.map(ask, [key for key in requests if not labeler.answers.replies(key)]))
    except NoReply as failure:
        raise NoReply(f"{failure}; its answers so far are kept: start the server and run the stage again") from None
    return [[tuple(labeler.answers.replies(key)[0]) for key in row] for row in keys]


def read_probabilities(labeler: ServedLabeler, choice: Any) -> list[float]:
    """p_yes and p_no of a chat completion: the words' spellings with and without a space before them are added up."""
    try:
        top = choice.logprobs.content[0].top_logprobs
    except (AttributeError, IndexError, TypeError):
        top = None
    if not top:
        raise ServerRefused(
            f"the labeler {labeler.name} gives no top_logprobs, so P(yes) and P(no) cannot be read: "
            "use a server that does (vLLM, SGLang) or load the model in this process"
        )
    return [mass(top, YES_WORDS), mass(top, NO_WORDS)]


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
