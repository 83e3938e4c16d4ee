"""Run a command for as long as the process that asked for it lives: `python -m rlaifv.inference.guard COMMAND …`.

Standard input is a pipe from that process, which closes however it ends, by `kill -9` too. Then the command and all
that it has started are ended; nothing of a server is left on a GPU.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

import psutil

from rlaifv.store.processes import end_with_parent

PATIENCE = 20.0
"""Seconds that the command has to end when it is asked to."""


def main(command: list[str]) -> int:
    """Returns the command's exit code."""
    if sys.platform == "linux":  # what a dead server leaves behind becomes this process's: vLLM's workers among them
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent)
    threading.Thread(target=end_with_input, args=(server,), daemon=True).start()
    code = server.wait()
    for left in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    return code


def end_with_input(server: subprocess.Popen) -> None:
    while os.read(0, 1024):
        pass
    signal_all(server, signal.SIGTERM)
    try:
        server.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        signal_all(server, signal.SIGKILL)


def signal_all(server: subprocess.Popen, number: int) -> None:
    """Send a signal to the command and to what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, number)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]) & 0xFF)  # the thread that reads may still wait
