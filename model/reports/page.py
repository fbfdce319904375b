"""What reports are made of: pages of one file without scripts, which load nothing; their policy
forbids it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.files import write_atomic
from model.reports.html import Html, join, tag

_STYLE = Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(path: Path, title: str, body: Iterable[str]) -> None:
    """Writes a page, or replaces it whole.

    Raises:
        OSError: it cannot be written.
    """
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    ]
    page = tag("html", tag("head", join(head)), tag("body", join(body)), lang="en")
    # Names of files may hold bytes that are no UTF-8.
    write_atomic(path, f"<!doctype html>\n{page}\n".encode(errors="backslashreplace"))


def section(title: str, *content: str) -> Html:
    return tag("section", tag("h2", title), *content)


def tiles(facts: Iterable[tuple[str, str]]) -> Html:
    """The few facts that a reader wants first."""
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
    return tag("dl", join(pairs), class_="tiles")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    head = [tag("tr", join(tag("th", name) for name in columns))] if columns else []
    body = [tag("tr", join(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", join(head + body)), class_="scroll")


def folded(summary: str, *content: str) -> Html:
    """What is shown to those who ask."""
    return tag("details", tag("summary", summary), *content)


def facts_table(facts: Mapping[str, Any]) -> Html:
    """Names and what they are; parts of parts as one, what is off left out."""
    return table([], [[key.replace("_", " "), words(each)] for key, each in flat(facts).items()])


def flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of parts as one; what is off is left out."""
    items = itertools.chain.from_iterable(
        flat(value).items()
        if isinstance(value, Mapping) and not _is_labels(key)
        else [(key, value)]
        for key, value in facts.items()
    )
    return {key: value for key, value in items if value is not None}


def words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} → {words(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _is_labels(key: str) -> bool:
    return key.endswith("_labels")
