"""A server of our own: started for a model whose `engine` is vllm, and there for as long as a stage needs it.

`server.command` says how it is started, so that vLLM may have an environment or a container of its own. It listens on a
free port of this machine alone, writes what it says to runs/servers/, and ends with whoever started it, however that
ends (`guard`). A server that dies is started again once.
"""

import contextlib
import logging
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch

from rlaifv import ROOT
from rlaifv.inference import guard
from rlaifv.inference.server import Server
from rlaifv.params import ServerParams
from rlaifv.stage import RUNS
from rlaifv.store import hours_and_minutes

log = logging.getLogger(__name__)

RESTARTS = 1
"""How often a server that dies is started again: what kills it twice kills it every time."""

TELL = 30.0
"""Seconds between log lines while it starts."""

LOGS = RUNS / "servers"


class EngineFailed(RuntimeError):
    """A server that a stage started does not come up, or has died too often."""


class Engine:
    """A server process.

    Args:
        name: of its model, by which it is asked.
        command: what starts it, word by word.
        port: where it listens on this machine.
        minutes: how long it may take until it answers.

    Raises:
        EngineFailed: it does not start; the message says what it said last, and where its log is.
    """

    def __init__(self, name: str, command: Sequence[str], port: int, minutes: float) -> None:
        self.name, self.command, self.minutes, self.restarts = name, list(command), minutes, 0
        self.address = f"http://127.0.0.1:{port}/v1"
        self.log = LOGS / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        self._lock = threading.Lock()
        self._process = self._start()

    def asked_by(self, params: ServerParams, give_up_after: int = 1) -> Server:
        """Who asks it, and starts it again."""
        return Server(f"the server of {self.name}", self.name, self.address, params, give_up_after, self.revive)

    def revive(self) -> int:
        """Start it again if it has died; how often that was so far. Raises EngineFailed when it has died too often."""
        with self._lock:
            if not answers(self.address):  # it may be about to end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
            if self._process.poll() is None:
                return self.restarts
            if self.restarts == RESTARTS:
                raise EngineFailed(
                    f"the server of {self.name} has died {RESTARTS + 1} times, the last time after saying "
                    f"{self._last_words()!r}: see {self.log}; its answers so far are kept"
                )
            self.restarts += 1
            log.warning(f"the server of {self.name} has died ({self._last_words()}): it is started again")
            self._process.stdin.close()
            self._process = self._start()
            return self.restarts

    def close(self) -> None:
        """Stop it, and wait until it is gone: its memory is the next model's."""
        self._process.stdin.close()
        try:
            self._process.wait(2 * guard.PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _start(self) -> subprocess.Popen:
        with self.log.open("ab") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", guard.__name__, *self.command],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt of a notebook is not meant for it
            )
        started = told = time.monotonic()
        log.info(f"{self.name}: {shlex.join(self.command)}")
        try:
            while not answers(self.address):
                waited = time.monotonic() - started
                if process.poll() is not None:
                    raise EngineFailed(
                        f"the server of {self.name} ended with code {process.returncode} while it started and said "
                        f"{self._last_words()!r}: see {self.log} and server.command"
                    )
                if waited > 60 * self.minutes:
                    raise EngineFailed(
                        f"the server of {self.name} does not answer after server.start_minutes = {self.minutes:g}, "
                        f"its last words: {self._last_words()!r}; see {self.log}"
                    )
                if time.monotonic() - told > TELL:
                    told = time.monotonic()
                    log.info(f"{self.name}: its server is starting since {hours_and_minutes(waited)}")
                time.sleep(0.5)
        except BaseException:
            process.stdin.close()
            process.wait()
            raise
        log.info(f"{self.name}: its server is ready after {hours_and_minutes(time.monotonic() - started)}")
        return process

    def _last_words(self) -> str:
        """The last error in its log, without what only points at another one; or else the last line."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        errors = [error for error in re.findall(r"\b\w+(?:Error|Exception): .+", text) if "root cause" not in error]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return (errors or lines or ["nothing"])[-1][:300]


def start_engine(path: Path, name: str, dtype: str, params: ServerParams) -> Engine:
    """A server of the checkpoint in a folder, as `server.command` starts it. Raises EngineFailed."""
    known = {"path": path, "name": name, "dtype": dtype, "gpus": max(1, torch.cuda.device_count()), "port": free_port()}
    words = shlex.split(params.command)
    for key, value in known.items():  # in every word, so that a path may hold blanks; other braces are the command's
        words = [word.replace(f"{{{key}}}", str(value)) for word in words]
    return Engine(name, words, known["port"], params.start_minutes)


def check_command(who: str, params: ServerParams) -> None:
    """ValueError where the program that `server.command` begins with is not there; before anything is fetched."""
    words = shlex.split(params.command)
    program = next((word for word in words if word != "env" and not re.match(r"\w+=", word)), "")
    if not shutil.which(program if "/" not in program else str(ROOT / program)):
        raise ValueError(
            f"{who}.engine is vllm, but server.command begins with {program!r}, which is not installed here: install "
            "vLLM in an environment of its own and name its program there (docs/engines.md), or engine: transformers"
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(address: str) -> bool:
    """Whether a server says which models it has; a machine's proxy is not asked for what is on this machine."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/models", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False
