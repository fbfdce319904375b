"""How far labelling is, on stderr: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


@contextmanager
def labelling_progress(
    total: int, quiet: bool, line_every_s: float = _LINE_EVERY_S
) -> Iterator[Callable[[bool], None]]:
    """Gives a function that is told of each video that is done, and whether it failed."""
    console = Console(stderr=True, quiet=quiet)
    counts = _Counts(total)
    if not console.is_terminal:
        told = counts.began

        def line(failed: bool) -> None:
            nonlocal told
            counts.add(failed)
            if time.monotonic() - told >= line_every_s or counts.done == total:
                told = time.monotonic()
                text = f"{counts.done:,} of {total:,} videos, {counts.speed()}"
                console.print(text, highlight=False, markup=False, soft_wrap=True)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total, speed="")

        def advance(failed: bool) -> None:
            counts.add(failed)
            bar.update(task, advance=1, speed=counts.speed(time_left=False))

        yield advance


class _Counts:
    def __init__(self, total: int) -> None:
        self.began = time.monotonic()
        self.total = total
        self.done = 0
        self.failed = 0

    def add(self, failed: bool) -> None:
        self.done += 1
        self.failed += failed

    def speed(self, time_left: bool = True) -> str:
        rate = self.done / max(time.monotonic() - self.began, 1e-9)
        parts = [f"{rate:.1f} videos/s"]
        if time_left and self.done < self.total:
            parts.append(f"{_duration((self.total - self.done) / rate)} left")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
