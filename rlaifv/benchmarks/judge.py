"""Ask a judge, keep every reply, and say what is missing.

A judge is any model behind an OpenAI-compatible server (`open_judge`), or one in this process (`load_judge`, or a
plain callable in a `Judge`). Every raw reply is appended to a cache file with the judge's name and the hash of its
prompt, so that a stopped evaluation goes on where it was and a repeated one asks nothing. A reply that cannot be read
is asked for again a bounded number of times, then listed; it is never turned into a score here.
"""

import ast
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rlaifv.inference.server import NoReply, ReplyCache, Server, ServerRefused, check_address, said
from rlaifv.params import ServerParams

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One question for a judge: the row that it is about, a user turn, a system turn (either may be empty)."""

    id: str
    text: str
    system: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of what the judge reads."""
        return hashlib.sha256(f"{self.system}\0{self.text}".encode()).hexdigest()


@dataclass(frozen=True)
class Judge:
    """A model that is asked.

    Attributes:
        name: stored with every reply and stated beside every score.
        ask: requests → replies in the same order; a NoReply in place of a reply that did not come.
        batch_size: requests handed to `ask` at once; replies are stored after each batch.
    """

    name: str
    ask: Callable[[Sequence[Request]], Iterable[str | NoReply]]
    batch_size: int = 64


@dataclass(frozen=True)
class Judged(Generic[T]):
    """What came of a list of requests.

    Attributes:
        verdicts: row id → parsed reply.
        replies: row id → raw reply; the last one, for a row whose replies cannot be read.
        missing: rows without a verdict, [{"id", "reason"}]; the next run asks for these alone.
        replied: replies that came in this call, unreadable ones included.
        cached: verdicts that the cache already held.
    """

    verdicts: Mapping[str, T]
    replies: Mapping[str, str]
    missing: Sequence[Mapping[str, str]]
    replied: int
    cached: int

    @property
    def unparsed(self) -> list[str]:
        """Ids of the rows that got a reply which cannot be read."""
        return [row["id"] for row in self.missing if row["id"] in self.replies]


def ask_all(
    requests: Sequence[Request],
    judge: Judge,
    parse: Callable[[str], T | None],
    cache: str | Path | None = None,
    attempts: int = 3,
    run: int = 0,
) -> Judged[T]:
    """Get a verdict for every request that can have one.

    Args:
        requests: one a row, ids unique.
        judge: whom to ask.
        parse: raw reply → verdict; None for a reply that cannot be read.
        cache: JSON-lines file of raw replies, made when absent and only appended to.
        attempts: how often a request is sent in this call before its unreadable reply is given up.
        run: number of the repetition; each has replies of its own.

    Raises:
        ValueError: two requests with one id.
        ServerRefused: the judge refuses everybody; replies that came before are in the cache.
    """
    if len({request.id for request in requests}) < len(requests):
        raise ValueError("two requests to the judge have one id; verdicts could not be told apart")
    store = ReplyCache(cache, ("judge", "prompt_sha256", "run"), str)
    verdicts: dict[str, T] = {}
    replies: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for request in requests:
        for reply in store.replies(judge.name, request.digest, run):
            _take(request, reply, parse, verdicts, replies, reasons)
    cached, replied = len(verdicts), 0
    waiting = [request for request in requests if request.id not in verdicts]
    for _ in range(attempts):
        unread = []
        for start in range(0, len(waiting), judge.batch_size):
            batch = waiting[start : start + judge.batch_size]
            for request, reply in zip(batch, judge.ask(batch), strict=True):
                if isinstance(reply, NoReply):
                    reasons[request.id] = f"no reply: {reply}"
                    continue
                replied += 1
                store.add(reply, id=request.id, judge=judge.name, prompt_sha256=request.digest, run=run)
                _take(request, reply, parse, verdicts, replies, reasons)
                if request.id not in verdicts:
                    unread.append(request)
        waiting = unread
    missing = [{"id": r.id, "reason": reasons[r.id]} for r in requests if r.id not in verdicts]
    return Judged(verdicts, replies, missing, replied, cached)


def _take(request: Request, reply: str, parse, verdicts: dict, replies: dict, reasons: dict) -> None:
    """File one raw reply under verdicts or under reasons; a readable reply is kept once it came."""
    if request.id in verdicts:
        return
    replies[request.id] = reply
    verdict = parse(reply)
    if verdict is None:
        reasons[request.id] = f"unreadable reply: {' '.join(reply.split())[-160:]!r}"
    else:
        verdicts[request.id] = verdict


def published_prompt(path: str | Path, name: str) -> str:
    """The string constant `name` of a published scorer's Python file, read without running it.

    The published prompts are not ours to ship; `rlaifv.benchmarks.fetch prompts` gets the files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no Python or assigns no such string.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run `python -m rlaifv.benchmarks.fetch prompts`")
    try:
        statements = ast.parse(path.read_text(encoding="utf-8")).body
    except SyntaxError as error:
        raise ValueError(f"{path} is no Python file: {error}") from None
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if name in names and isinstance(statement.value.value, str):
                return statement.value.value
    raise ValueError(f"{path} assigns no string to {name}")


def prompt_label(template: str, published: bool) -> str:
    """How a score names its prompt: whose it is, and the beginning of its hash."""
    return f"{'published' if published else 'ours'} {hashlib.sha256(template.encode()).hexdigest()[:12]}"


def open_judge(
    model: str,
    base_url: str | None,
    params: ServerParams,
    *,
    max_tokens: int = 2048,
    temperature: float | None = 0.0,
    give_up_after: int = 5,
) -> Judge:
    """A judge behind an OpenAI-compatible server (OpenAI, vLLM, SGLang, `transformers serve`, …).

    Args:
        model: its name there.
        base_url: such as http://localhost:8000/v1; None is OpenAI's, or the environment's OPENAI_BASE_URL.
        params: how it is asked.
        max_tokens, temperature: of the reply; None leaves the temperature to the server.
        give_up_after: failed requests in a row after which the rest is listed without being asked.
    """
    server = judge_server(model, base_url, params, give_up_after)
    return served_judge(model, server, max_tokens=max_tokens, temperature=temperature)


def served_judge(name: str, server: Server, *, max_tokens: int = 2048, temperature: float | None = 0.0) -> Judge:
    """A judge behind a `Server`."""
    options = {"max_tokens": max_tokens} | ({} if temperature is None else {"temperature": temperature})

    def ask_one(request: Request) -> str | NoReply:
        turns = [("system", request.system), ("user", request.text)]
        try:
            reply = server.complete([{"role": role, "content": text} for role, text in turns if text], **options)
        except (NoReply, ServerRefused) as error:  # also of one row alone, such as a prompt that is too long
            return NoReply(str(error))
        text = said(reply.choices[0])
        return text if text.strip() else NoReply("an empty reply")

    def ask(requests: Sequence[Request]) -> Iterator[str | NoReply]:
        with ThreadPoolExecutor(server.params.concurrency) as pool:
            yield from pool.map(ask_one, requests)
        if server.refusal:
            raise ServerRefused(server.refusal)

    return Judge(name, ask)


def judge_server(model: str, base_url: str | None, params: ServerParams, give_up_after: int = 1) -> Server:
    """The server of a judge; ValueError for an address with a password in it."""
    address = base_url or os.environ.get("OPENAI_BASE_URL", "OpenAI")
    check_address(address, params)
    return Server(f"the judge {model} at {address}", model, base_url, params, give_up_after)


def load_judge(path: str, *, max_tokens: int = 1024, batch_size: int = 8, device: str = "auto") -> Judge:
    """A judge in this process: a checkpoint folder or hub id of a language model, decoded greedily."""
    from rlaifv.inference.decoding import fit_answers  # here, for a command that asks no model shall start at once
    from rlaifv.inference.sampling import Prompt
    from rlaifv.vlm.chat_format import UnfitText
    from rlaifv.vlm.loading import load_vlm

    model = load_vlm(path, device=device, dtype=None)

    def ask(requests: Sequence[Request]) -> list[str | NoReply]:
        prompts = [Prompt(None, "\n\n".join(filter(None, (r.system, r.text)))) for r in requests]
        replies = fit_answers(model, prompts, 1, max_tokens)
        return [
            NoReply(str(reply)) if isinstance(reply, UnfitText) else reply or NoReply("an empty reply")
            for reply in replies
        ]

    return Judge(f"{path}@{model.fingerprint}", ask, batch_size)
