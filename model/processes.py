"""Processes that must not outlive their parent. Imports the standard library only."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Makes the kernel kill this process as soon as its parent ends, even if SIGKILL ends the
    parent while this process is busy or stopped. Ignores Ctrl-C, which reaches every process of a
    terminal and is the parent's to handle.

    To be called first in a process of `multiprocessing`. To the kernel, the parent is the thread
    that started this process, or the fork server.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # the parent ended before the call
        os._exit(1)
