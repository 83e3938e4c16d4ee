"""Models behind a server: sampled answers, and a labeler's P(yes), read off the log-probs of one token.

A model is named by `http://host:8000/v1#model` in place of a folder, or is a checkpoint for which we start a server of
our own (`engine`). A question goes with its image to the chat endpoint; for p_yes and p_no one token is asked for and
its `top_logprobs` are read. The image travels as its file's own bytes, and the first request about it goes ahead of
the others, which then find the image in the server's prefix cache.

Each answer is on disk as soon as it came, so a run that was stopped, or whose server died, goes on and asks nothing
twice. A checkpoint is known by its bytes, any other model by its name and by what it answers to fixed questions
(`recognize`): at another address it keeps its answers, and another model at the same address gets none of them.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from rlaifv.fingerprint import digest
from rlaifv.inference.sampling import Decoding
from rlaifv.inference.server import (
    NoReply,
    ReplyCache,
    RequestRefused,
    Server,
    ServerRefused,
    check_address,
    is_served,
    said,
)
from rlaifv.params import ServerParams
from rlaifv.records import T, write_atomic
from rlaifv.vlm.chat_format import Reader, UnfitText, check_text
from rlaifv.vlm.images import FORMATS, is_upright, open_image

YES_WORDS, NO_WORDS = ("Yes", "yes"), ("No", "no")

ROUNDING = 1e-3
"""How far above 0 a log-prob may be that a server rounded."""

TOP_LOGPROBS = 20
"""The most that OpenAI's interface gives; a word that is not among them counts as probability 0."""


@dataclass(frozen=True)
class Served:
    """A model behind a server.

    Attributes:
        name: what it is called in messages and records.
        fingerprint: stored with all that it says: that of its checkpoint, or of an unknown one what `recognize` found.
        server: whom to ask.
        answers: [p_yes, p_no] or a `Sampled` as a dictionary, by what was asked.
        reader: reads what the model reads, where its checkpoint is here: texts that would steer it are found in time.
        close: ends a server of our own.
    """

    name: str
    fingerprint: str
    server: Server = field(repr=False)
    answers: ReplyCache = field(repr=False)
    reader: Reader | None = field(default=None, repr=False)
    close: Callable[[], None] = field(default=lambda: None, repr=False)


def open_served(path: str, params: ServerParams, folder: Path | None = None, must_see: bool = False) -> Served:
    """The model of a path such as `http://127.0.0.1:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct`.

    Args:
        path: address (ending in /v1) and model.
        params: how it is asked.
        folder: where its answers are kept, and what it is recognized by; None keeps them in memory.
        must_see: whether a model that takes no images is refused.

    Raises:
        ValueError: the path names no model, or holds a password.
        NoReply, ServerRefused: it cannot be asked.
    """
    url, _, model = path.partition("#")
    check_address(url, params)
    if not is_served(path) or not model:
        raise ValueError(f"{path!r} is no served model: write http://HOST:PORT/v1#MODEL")
    url = url.rstrip("/")
    server = Server(f"the model {url}#{model}", model, url, params)
    try:
        fingerprint = recognize(server, folder, must_see)
    except NoReply as failure:
        raise NoReply(f"{failure}: start the server and run the stage again") from None
    return Served(model, fingerprint, server, kept_answers(folder, fingerprint))


def kept_answers(folder: Path | None, fingerprint: str) -> ReplyCache:
    """What a model has said so far, in a folder or, without one, in memory alone."""
    return ReplyCache(folder / f"served-{fingerprint}.jsonl" if folder else None, ("key",), (list, dict))


# ---- which model it is

PROBES = (
    "What is in the picture?",
    "Which color is the largest shape?",
    "Is there a circle? Please answer yes or no.",
    "Say the first word of a story about this picture.",
    "Name an animal.",
    "Name a number between one and a hundred.",
)
"""Asked about `probe_picture` to tell models apart: what comes first of such answers differs between models."""

SAME = 0.1
"""Total variation distance up to which two first-token distributions may be one model's: a server computes in bfloat16
and in batches with other requests, which moves a log-prob by 1/8 or so and a probability by less than this."""


def recognize(server: Server, folder: Path | None, must_see: bool = False) -> str:
    """The fingerprint of a served model: 16 hex digits, the same for the same model wherever it is served.

    Nobody can read weights that are elsewhere. What a model is known by is its name and its first answer token's
    distribution for every one of `PROBES`, kept in `folder`; it is the model of that name whose kept distributions
    agree within `SAME`, or a new one. A language model, which refuses images, is asked without; with `must_see` that is
    a RequestRefused.
    """
    picture = probe_picture()
    try:
        first = ask_first_token(server, picture, PROBES[0])
    except RequestRefused:
        if must_see:
            raise
        picture = None
        first = ask_first_token(server, picture, PROBES[0])
    replies = [first, *(ask_first_token(server, picture, question) for question in PROBES[1:])]
    probe = [probabilities(server, reply) for reply in replies]
    kept = sorted(folder.glob("served-*.json")) if folder else []
    for file in kept:
        known = json.loads(file.read_text())
        if known["model"] == server.model and max(map(distance, known["probe"], probe)) <= SAME:
            return known["fingerprint"]
    fingerprint = digest([server.model, probe])
    if folder:
        known = {"fingerprint": fingerprint, "model": server.model, "probe": probe}
        write_atomic(folder / f"served-{fingerprint}.json", json.dumps(known) + "\n")
    return fingerprint


def distance(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Total variation distance between two distributions over tokens, of which only the likeliest are known."""
    return sum(abs(a.get(token, 0.0) - b.get(token, 0.0)) for token in a.keys() | b.keys()) / 2


def probe_picture() -> str:
    """A drawing as a data URL: a large red circle and a small blue square."""
    image = Image.new("RGB", (224, 224), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((24, 24, 152, 152), fill="red")
    draw.rectangle((168, 168, 208, 208), fill="blue")
    return encoded_url(image, "PNG")


# ---- yes or no


def judge_served(
    labeler: Served, items: Sequence[tuple[str, Sequence[str]]]
) -> list[list[tuple[float, float] | UnfitText]]:
    """`yes_no.judge_fit` for a served labeler: (p_yes, p_no) per question, or why it cannot be put to this model. Each
    distinct question about an image (a `data_url`) is asked once; every answer is kept as it comes.

    Raises:
        NoReply: after all tries of one request; no more are started.
        ServerRefused: a wrong key or model, or a server that gives no `top_logprobs`.
    """
    waiting: dict[str, dict[str, str]] = defaultdict(dict)  # image → key → question
    keys = [[answer_key(url, question) for question in questions] for url, questions in items]
    for (url, questions), row in zip(items, keys, strict=True):
        for key, question in zip(row, questions, strict=True):
            if not labeler.answers.replies(key):
                waiting[url][key] = question
    groups = [[(key, url, question) for key, question in asked.items()] for url, asked in waiting.items()]
    problems = ask_all(labeler, groups, ask_yes_no)
    return [
        [
            problems.get((url, q)) or tuple(labeler.answers.replies(key)[0])
            for key, q in zip(row, questions, strict=True)
        ]
        for (url, questions), row in zip(items, keys, strict=True)
    ]


def ask_yes_no(model: Served, image: str | None, question: str) -> list[float]:
    """p_yes and p_no."""
    return read_probabilities(model.server, ask_first_token(model.server, image, question))


def ask_all(
    model: Served, groups: Iterable[Sequence[tuple]], reply: Callable[..., list | dict]
) -> dict[tuple[str | None, str], UnfitText]:
    """Ask a model, and keep each reply as it comes.

    Args:
        model: who is asked.
        groups: requests, each the key of its reply, an image or None, a text, and what else `reply` needs; the first of
            a group goes ahead of the others.
        reply: asks one: model, image, text and the rest.

    Returns:
        (image, text) → why it cannot be put to this model: it holds one of its special tokens, or the server refuses it
        alone (a context that is too short).

    Raises NoReply, which says that nothing is lost, and ServerRefused.
    """
    problems: dict[tuple[str | None, str], UnfitText] = {}

    def ask(request: tuple) -> None:
        key, image, text, *more = request
        if (image, text) in problems:
            return
        try:
            if model.reader:
                check_text(model.reader, text)
            model.answers.add(reply(model, image, text, *more), key=key)
        except (RequestRefused, UnfitText) as refused:
            problems[image, text] = UnfitText(str(refused))

    try:
        ask_in_order(ask, filter(None, groups), model.server.params.concurrency)
    except NoReply as failure:
        raise NoReply(f"{failure}; its answers so far are kept: start the server and run the stage again") from None
    return problems


def ask_in_order(ask: Callable[[T], None], groups: Iterable[Sequence[T]], concurrency: int) -> None:
    """Call `ask` for everything, so many at a time. The first of a group (the questions of one image) goes alone: the
    others follow when it is answered, ahead of the groups that have not begun. The first error ends it, once what is
    under way has ended."""
    unseen, ready = deque(groups), deque()
    running: dict[Future, Sequence[T]] = {}  # → what may follow it
    with ThreadPoolExecutor(concurrency) as pool:
        while unseen or ready or running:
            while len(running) < concurrency and (ready or unseen):
                first, *rest = [ready.popleft()] if ready else unseen.popleft()
                running[pool.submit(ask, first)] = rest
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                rest = running.pop(future)
                future.result()
                ready.extend(rest)


def ask_first_token(server: Server, image: str | None, question: str) -> Any:
    """The choice of a completion of one token; `image` is a data URL."""
    # temperature 1: some servers report log-probs after dividing by it
    options = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
    return server.complete(user_turn(image, question), **options).choices[0]


def user_turn(image: str | None, text: str) -> list[dict]:
    """The messages of a question, about an image (a data URL) or about none."""
    seen = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": seen if image else text}]


def top_tokens(server: Server, choice: Any) -> list[tuple[str, float]]:
    """The likeliest first tokens of an answer, each with its probability; distinct tokens may be spelled alike.

    Raises ServerRefused for a server that gives no `top_logprobs`, or some that are none.
    """
    try:
        top = [(entry.token, entry.logprob) for entry in choice.logprobs.content[0].top_logprobs]
    except (AttributeError, IndexError, TypeError):
        top = []
    if not top:
        raise ServerRefused(
            f"{server.who} gives no top_logprobs, so P(yes) and P(no) cannot be read: "
            "use a server that does (vLLM, SGLang) or load the model in this process"
        )
    wrong = "P(yes) and P(no) would be wrong; use another server or version"
    for token, logprob in top:
        if type(logprob) not in (int, float) or not -math.inf < logprob <= ROUNDING or not isinstance(token, str):
            raise ServerRefused(
                f"{server.who} gives {token!r:.40} the log-prob {logprob!r:.40}, expected a number up to 0: {wrong}"
            )
    likely = [(token, math.exp(min(logprob, 0.0))) for token, logprob in top]
    if (total := sum(probability for _, probability in likely)) > 1.2:  # servers round log-probs by up to an eighth
        raise ServerRefused(f"{server.who} gives {len(top)} tokens a probability of {total:.2f} together: {wrong}")
    return likely


def probabilities(server: Server, choice: Any) -> dict[str, float]:
    """The likeliest first tokens → probability."""
    found: dict[str, float] = defaultdict(float)
    for token, probability in top_tokens(server, choice):
        found[token] += probability
    return dict(found)


def read_probabilities(server: Server, choice: Any) -> list[float]:
    """p_yes and p_no of a chat completion: the words' spellings with and without a space before them are added up."""
    top = top_tokens(server, choice)
    return [mass(top, YES_WORDS), mass(top, NO_WORDS)]


def mass(top: Iterable[tuple[str, float]], words: Sequence[str]) -> float:
    """Total probability of the tokens that spell one of `words`."""
    return min(1.0, sum(probability for token, probability in top if token.strip(" ▁Ġ\n") in words))


# ---- sampled answers


@dataclass(frozen=True)
class Sampled:
    """A sampled answer: `tokens` without the end token, `finish_reason` "stop" or "length"."""

    text: str
    tokens: int
    finish_reason: str


def sample_served(
    model: Served,
    asked: Sequence[tuple[str | None, str]],
    seeds: Sequence[Sequence[int]],
    decoding: Decoding,
) -> list[list[Sampled] | UnfitText]:
    """Answers to questions, each about an image (a `data_url`) or about none.

    Args:
        model: who answers.
        asked: image and text of each question.
        seeds: for each question, a seed for every answer to it; the first answer goes ahead of the others, which then
            find image and question in the server's prefix cache.
        decoding: how the tokens are chosen.

    Returns:
        For each question its answers, or why it cannot be put to this model: it holds one of its special tokens, or
        the server refuses it alone (a context that is too short).

    Raises:
        NoReply: after all tries of one request; no more are started.
        ServerRefused: a wrong key or model, or a server that does not count tokens.
    """
    keys = [sample_keys(image, text, decoding, row) for (image, text), row in zip(asked, seeds, strict=True)]
    groups = []
    for (image, text), row, numbers in zip(asked, keys, seeds, strict=True):
        waiting = {key: seed for key, seed in zip(row, numbers, strict=True) if not model.answers.replies(key)}
        groups.append([(key, image, text, seed, decoding) for key, seed in waiting.items()])
    problems = ask_all(model, groups, ask_for_answer)
    return [
        problems.get(question) or [Sampled(**model.answers.replies(key)[0]) for key in row]
        for question, row in zip(asked, keys, strict=True)
    ]


def ask_for_answer(model: Served, image: str | None, text: str, seed: int, decoding: Decoding) -> dict[str, Any]:
    """One sampled answer, a `Sampled` as a dictionary."""
    options: dict[str, Any] = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
    options |= {"seed": seed, "top_p": decoding.top_p} if decoding.temperature else {}
    more = {"top_k": decoding.top_k} if decoding.top_k and decoding.temperature else {}
    if model.reader:  # a server of ours knows its tokenizer's end token, and not those of its generation config
        more["stop_token_ids"] = model.reader.eos_token_ids
    reply = model.server.complete(user_turn(image, text), **options, extra_body=more)
    choice, count = reply.choices[0], getattr(reply.usage, "completion_tokens", None)
    if type(count) is not int:
        raise ServerRefused(f"{model.server.who} does not say how many tokens an answer has: use vLLM or SGLang")
    cut = choice.finish_reason == "length"
    return vars(Sampled(said(choice), count if cut else max(count - 1, 0), "length" if cut else "stop"))


def sample_keys(image: str | None, text: str, decoding: Decoding, seeds: Sequence[int]) -> list[str]:
    """What each answer to a question is kept under; the image, which may be long, is read once."""
    question = digest([image, text, dataclasses.asdict(decoding)])
    return [f"{question}-{seed if decoding.temperature else 0}" for seed in seeds]


# ---- images


SENT_AS_IT_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
"""Formats of images that every server takes."""


def data_url(path: Path) -> str:
    """An image file as a data URL: its own bytes where every server sees in them what we see (RGB or gray, upright, one
    picture, in a common format); anything else is written anew, a photo as JPEG, the rest without loss.

    Raises FileNotFoundError or ValueError as `open_image` does.
    """
    image, data = open_image(path), path.read_bytes()
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        kind = file.format
        plain = file.mode in ("RGB", "L") and "transparency" not in file.info and getattr(file, "n_frames", 1) == 1
    if kind in SENT_AS_IT_IS and plain and is_upright(data):
        return f"data:{SENT_AS_IT_IS[kind]};base64,{base64.b64encode(data).decode()}"
    return encoded_url(image, "JPEG" if kind in ("JPEG", "MPO") else "PNG")


def encoded_url(image: Image.Image, kind: str) -> str:
    """Pixels as a data URL; JPEG at a quality that keeps them."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return f"data:{SENT_AS_IT_IS[kind]};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def answer_key(image: str, question: str) -> str:
    return hashlib.blake2b(f"{image}\0{question}".encode(), digest_size=16).hexdigest()
