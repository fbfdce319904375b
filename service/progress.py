"""What people see in a terminal: steps as they begin, tables as wide as they need to be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_UNLIMITED = 10_000


@contextlib.contextmanager
def steps(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Gives a function that is told each step as it begins; on stderr.

    A spinner on a terminal, plain lines in a log.
    """
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield lambda step: console.print(
            f"{step} ...", highlight=False, markup=False, soft_wrap=True
        )
        return
    with console.status("starting") as status:
        yield lambda step: status.update(escape(f"{step} ..."))


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
