"""Progress for people: a spinner or a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console


@contextlib.contextmanager
def steps(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Gives a function that is told each step as it begins; on stderr."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield lambda step: console.print(f"{step} ...", highlight=False)
        return
    with console.status("starting") as status:
        yield lambda step: status.update(f"{step} ...")
