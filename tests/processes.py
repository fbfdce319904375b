"""Processes by their number, as Linux's /proc describes them, and ports for them."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def children_of(pid: int) -> set[int]:
    """Returns the processes that a process has started itself; none where it has ended."""
    with contextlib.suppress(OSError):
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        return {int(child) for each in lists for child in each.split()}
    return set()


def descendants_of(pid: int) -> set[int]:
    """Returns the processes that a process has started itself or by way of its children."""
    children = children_of(pid)
    return children.union(*map(descendants_of, children))


def resident_bytes(pid: int) -> int:
    """Returns the memory that a process holds; 0 where it has ended."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the state on; none where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def free_port() -> int:
    """Returns a TCP port of this machine that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
