"""What people see in a terminal: steps as they begin, how far a command is, and tables.

Progress goes to stderr: a bar or spinner on a terminal, plain lines in a log.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000
_SPEED_OVER_S = 600.0  # for the time left: of several training steps, however slow


@contextlib.contextmanager
def steps(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows the name of a step as the step begins."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield lambda step: console.print(
            f"{step} ...", highlight=False, markup=False, soft_wrap=True
        )
        return
    with console.status("starting") as status:
        yield lambda step: status.update(escape(f"{step} ..."))


class Bar:
    """How far a command is."""

    def __init__(self, console: Console, progress: Progress, line_every_s: float | None) -> None:
        self._console = console
        self._progress = progress
        self._line_every_s = line_every_s
        self._task = progress.add_task("", total=None)
        self._last_line = -float("inf")

    def show(self, text: str, done: float, total: float) -> None:
        """Shows that so much is done, described by the text."""
        self._progress.update(self._task, description=text, completed=done, total=total)
        now = time.monotonic()
        if self._line_every_s is None or (
            now - self._last_line < self._line_every_s and done < total
        ):
            return
        self._last_line = now
        left = self._progress.tasks[self._task].time_remaining
        self.print(text if not left else f"{text}, {_duration(left)} left")

    def print(self, text: str | Text) -> None:
        """Prints a line on stderr, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def bar(shown: bool = True, *, lines: bool = True, line_every_s: float = 10.0) -> Iterator[Bar]:
    """Yields a bar for a terminal, which prints a line every ten seconds elsewhere.

    Args:
        shown: False shows nothing but what `Bar.print` prints.
        lines: False prints no lines where there is no terminal.
    """
    console = Console(stderr=True)
    live = shown and console.is_terminal
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,  # what is printed meanwhile belongs to stdout
        disable=not live,
        speed_estimate_period=_SPEED_OVER_S,
    )
    with progress:
        yield Bar(console, progress, line_every_s if shown and lines and not live else None)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def print_table(title: str, table: Table) -> None:
    """Prints a table on stdout under its title.

    A pipe or a file has no width: there the table is as wide as it needs to be. On a terminal,
    what does not fit is folded, never cut off.
    """
    console = Console()
    if not console.is_terminal:
        console.width = _UNLIMITED
    table.box = None
    table.pad_edge = False
    table.padding = (0, 2, 0, 0)
    for column in table.columns:
        column.overflow = "fold"
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
