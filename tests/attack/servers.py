"""A labeler behind a server: one that turns NaN half-way, and a planted key that must turn up nowhere."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkout import edit_params
from harness import Attempts, Case
from stages import NAMED, Done, contents, copy_run, run_stage

SCRIPT = Path(__file__).with_name("spoiled_server.py")
KEY = "sk-planted-0123456789abcdef"
WAYS_TO_FAIL = ("refuse", "broken", "elsewhere", "garbage", "empty", "cut", "text", "slow")


@contextmanager
def serving(port: int, habit: str, after: int = 0) -> Iterator[None]:
    path = os.pathsep.join(sys.path)
    command = [sys.executable, str(SCRIPT), str(port), habit, str(after)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            process.stdout.readline()
            yield
        finally:
            process.kill()


def with_server(whole: Path, folder: Path) -> int:
    """A copy of the whole run, before feedback, whose labeler is behind a server; returns its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    copy_run(whole, folder, NAMED["feedback@1"])

    def served(content) -> None:
        content["labeler"].update(path=f"http://127.0.0.1:{port}/v1#some/model")
        content["server"].update(timeout=3.0, tries=1)

    edit_params(folder, served)
    return port


def feedback(folder: Path) -> Done:
    return run_stage(folder, NAMED["feedback@1"], OPENAI_API_KEY=KEY)


def outs(folder: Path) -> dict[str, bytes]:
    return contents(folder, NAMED["feedback@1"].outs)


def servers(attempts: Attempts, whole: Path) -> None:
    folder = attempts.folder
    port = with_server(whole, folder)
    said = ""
    with serving(port, "well"):
        for name in ("models", "feedback@1"):
            done = run_stage(folder, NAMED[name], OPENAI_API_KEY=KEY)
            assert done.code == 0, done.text[-800:]
            said += done.text
    expected = outs(folder)

    def begin_anew() -> None:
        shutil.rmtree(folder / NAMED["feedback@1"].outs[0])
        for path in (folder / "scratch").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix == ".jsonl":  # the replies; what a model is known by stays
                path.unlink()

    begin_anew()
    with attempts.attack("not a number", "a served labeler that answers NaN half-way"), serving(port, "nan", 12):
        done = feedback(folder)
        said += done.text
        assert "expected a number" in done.one_line("40_feedback") and not outs(folder), done.text
    for habit in WAYS_TO_FAIL:
        with attempts.attack("served-labeler habits", f"{habit} half-way"), serving(port, habit, 10):
            done = feedback(folder)
            said += done.text
            assert f"127.0.0.1:{port}" in done.one_line("40_feedback") and not outs(folder), done.text
    for kind in ("not a number", "served-labeler habits"):
        with attempts.attack(kind, "the same bytes when the server is well again"), serving(port, "well"):
            done = feedback(folder)
            said += done.text
            assert done.code == 0 and outs(folder) == expected, done.text[-800:]
    with attempts.attack("served-labeler habits", "a planted key in any file or output"):
        found = [str(file) for file in folder.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
        assert not found and KEY not in said, f"the key is in {found or 'what was printed'}"


SERVERS = [Case("served labeler", ("served-labeler habits", "not a number"), servers)]
