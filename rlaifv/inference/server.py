"""An OpenAI-compatible server (vLLM, SGLang, …): requests that are repeated, refused or answered, and kept replies.

The key comes from the environment, is stored nowhere and taken out of whatever a server says; a server that sends us
elsewhere is not followed.
"""

import json
import logging
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from rlaifv.params import ServerParams, has_secret
from rlaifv.records import to_json

log = logging.getLogger(__name__)

SILENT = 30
"""Seconds after which a log line says that a server does not answer."""


class NoReply(RuntimeError):
    """No reply to one request; the message says why. What came before is kept."""


class ServerRefused(ValueError):
    """The server answers, but not as it must: a wrong key, an unknown model, a request that it cannot take."""


class RequestRefused(ServerRefused):
    """One request that the server cannot take, such as a prompt that is too long for the model; others it can."""


class Server:
    """A model at an OpenAI-compatible address, and whether it still serves.

    Once it refuses everybody (`refusal`), or after `give_up_after` requests in a row without a reply, nothing more is
    sent.

    Args:
        who: how messages name it.
        model: its name there.
        base_url: such as http://localhost:8000/v1; None is OpenAI's, or the environment's OPENAI_BASE_URL.
        params: how it is asked. A request is sent again when it times out, or the server answers 429 or 5xx, something
            else than a chat completion, or is not there; the pauses between grow from half a second to eight.
        revive: starts a server of our own again if it has died, and says how often that was so far: a request that
            died with it is sent anew. Such a server is on this machine, and no proxy is asked for it.

    Raises:
        ValueError: the address holds a password, which would get into messages and files, or the key is none.
    """

    def __init__(
        self,
        who: str,
        model: str,
        base_url: str | None,
        params: ServerParams,
        give_up_after: int = 1,
        revive: Callable[[], int] | None = None,
    ):
        import openai

        check_address(base_url or os.environ.get("OPENAI_BASE_URL", ""), params)
        self.key = os.environ.get(params.key_variable, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(f"the environment variable {params.key_variable} holds no key: it has odd characters")
        self.client = openai.OpenAI(
            api_key=self.key or "none",
            base_url=base_url,
            timeout=params.timeout,
            max_retries=params.tries - 1,
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=revive is None),
        )
        self.who, self.model, self.params, self.give_up_after = who, model, params, give_up_after
        self.revive, self.revived = revive, 0
        self.refusal, self.failures, self.last, self.silent = "", 0, "", False

    def told(self, text: str) -> str:
        """What a server says, in a line without the key: some repeat it."""
        for form in self.key_forms():
            text = text.replace(form, "(the key)")
        return " ".join(text.split())[:200]

    def key_forms(self) -> set[str]:
        """How the key may stand in a text. What is shorter than that is no secret ("none", "EMPTY")."""
        written = {self.key, repr(self.key)[1:-1], json.dumps(self.key)[1:-1], quote(self.key, safe="")}
        return written if len(self.key) >= 6 else set()

    def problem(self) -> str:
        """What keeps it from being asked, found without a question; "" where nothing does."""
        import openai

        try:
            listed = self.client.with_options(timeout=10, max_retries=0).models.list()
            models = [model.id for model in listed.data or []]
        except openai.NotFoundError:  # it answers, and lists no models
            return ""
        except openai.APIStatusError as error:
            return f"{self.who} answers HTTP {error.status_code}: {self.told(error.message)}"
        except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
            return f"{self.who} does not answer ({self.told(str(error))}): start the server"
        if models and self.model not in models:
            return f"{self.who} serves {self.told(', '.join(map(str, models[:3])))} and no such model"
        return ""

    def complete(self, messages: list[dict], **options: Any) -> Any:
        """One chat completion with a choice; every way in which it can fail becomes one clear line.

        Raises:
            NoReply: none after all tries, or the server was given up before.
            ServerRefused: HTTP 3xx or 4xx or a wrong reply, for this request or (`refusal`) for all.
            RequestRefused: HTTP 400, 413 or 422, for this request.
        """
        if self.refusal:
            raise ServerRefused(self.refusal)
        if self.failures >= self.give_up_after:
            raise NoReply(f"{self.who} is not asked after {self.failures} failures in a row, the last: {self.last}")
        waiting = threading.Timer(SILENT, self.say_silent)
        waiting.daemon = True
        waiting.start()
        try:
            while True:
                before = self.revived
                reply, reason = self.ask(messages, options)
                if reply is not None or self.revive is None:
                    break
                self.revived = self.revive()
                if self.revived == before:
                    break
        finally:
            waiting.cancel()
        if reply is not None:
            self.failures, self.silent = 0, False
            return reply
        self.failures, self.last = self.failures + 1, reason
        raise NoReply(f"{self.who} does not answer after {self.params.tries} tries ({reason})")

    def ask(self, messages: list[dict], options: Mapping[str, Any]) -> tuple[Any, str]:
        """A chat completion, or None and why there was none. Raises ServerRefused."""
        import openai

        reason = ""
        for attempt in range(self.params.tries):
            time.sleep(min(0.25 * 2**attempt, 8) if attempt else 0)
            try:
                raw = self.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **options
                )
                reply = raw.parse()
                _ = reply.choices[0].message.content  # where there is none, this is no chat completion
            except openai.APIStatusError as error:
                status, reason = error.status_code, f"HTTP {error.status_code}: {self.told(error.message)}"
                if status >= 500 or status in (408, 409, 429):
                    return None, reason  # the client has tried again
                if status < 400:
                    where = urlsplit(error.response.headers.get("location", "")).netloc or "another path"
                    reason = f"HTTP {status} and sends us to {self.told(where)}: give that address if it is right"
                if status in (400, 413, 422):
                    raise RequestRefused(f"{self.who} answers {reason}") from None
                self.refuse(f"answers {reason}", everybody=status in (401, 403, 404) or status < 400)
            except openai.OpenAIError as error:  # no connection, or no reply in time
                return None, f"{type(error).__name__}: {self.told(str(error))}"
            except (AttributeError, IndexError, TypeError, ValueError):
                reason = "no chat completion: is this an OpenAI-compatible address?"
                continue
            if any(form in raw.text for form in self.key_forms()):
                self.refuse("repeats the key in its answer: nothing of it is kept")
            name = str(reply.model or self.model)
            if not re.fullmatch(re.escape(self.model) + r"([-@:].*)?", name):  # some name the very version
                self.refuse(f"answers as the model {self.told(name)}: give that name if it is the right one")
            return reply, ""
        return None, reason

    def refuse(self, what: str, everybody: bool = True) -> NoReturn:
        """Raise ServerRefused, for this request or for all from now on."""
        if everybody:
            self.refusal = f"{self.who} {what}"
        raise ServerRefused(f"{self.who} {what}") from None

    def say_silent(self) -> None:
        """Once for all requests that wait."""
        if not self.silent:
            self.silent = True
            log.warning(
                f"{self.who} has said nothing for {SILENT} s: it gets {self.params.timeout:g} s and "
                f"{self.params.tries} tries (server.timeout, server.tries)"
            )


class ReplyCache:
    """Replies by what was asked, in a JSON-lines file that is only appended to; without a path, in memory alone.

    Args:
        path: made when absent.
        key: the fields of a line that say what was asked; "reply" holds the reply.
        kind: the type of a reply; a line without one (a process was killed while it wrote) counts as not there.
    """

    def __init__(self, path: str | Path | None, key: Sequence[str], kind: type | tuple[type, ...]):
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
                    file.write(to_json({**row, "reply": reply}) + "\n")


def said(choice: Any) -> str:
    """The text of a choice, without half a character, which is in no file."""
    return str(choice.message.content or "").encode(errors="replace").decode()


def is_served(path: str) -> bool:
    """Whether a model path of the parameter file is a server's address."""
    return path.startswith(("http://", "https://"))


def check_address(url: str, params: ServerParams) -> None:
    """Raise ValueError, which does not show it, for an address with a user, a password or a query in it."""
    if has_secret(url):
        raise ValueError(
            "a server's address must hold no user, no password and nothing after a ?: "
            f"put the key into the environment variable {params.key_variable}"
        )
