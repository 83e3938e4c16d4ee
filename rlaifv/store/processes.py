"""Processes that end with whoever started them."""

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Have the kernel of Linux send SIGTERM to this process when the one that started it dies, however it dies; called
    between fork and exec. A kernel that was killed would leave its training behind, which holds the GPUs and the run's
    lock; the guard of a server would leave that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
