"""Long videos of tiny size, quick to make, and who decodes them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from tests.videos import encode


def write_long_video(path: Path, seconds: int, rate: int = 10, side: int = 64) -> Path:
    """A bright square that moves right for half of the time, then stays; H.264."""
    count = seconds * rate

    def draw(index: int) -> np.ndarray:
        picture = np.full((side, side, 3), 40, np.uint8)
        left = min(index, count // 2) * 3 % (side - 16)
        picture[20:36, left : left + 16] = 220
        return picture

    return encode(path, map(draw, range(count)), rate=rate, preset="ultrafast")


def worker_at(spool: Path) -> int:
    """The decoder process that has a file in this folder open."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for process in Path("/proc").glob("[0-9]*"):
            if int(process.name) == os.getpid():
                continue
            try:
                opened = [str(entry.readlink()) for entry in (process / "fd").iterdir()]
            except OSError:
                continue
            if any(name.startswith(str(spool)) for name in opened):
                command = (process / "cmdline").read_bytes()
                if b"multiprocessing" in command:
                    return int(process.name)
        time.sleep(0.05)
    raise AssertionError("no worker decodes")
