"""HTML and SVG as nested calls. What is not `Html` already is text, and is escaped: labels and
paths are other people's words.

    tag("td", "a < b", class_="wide")    <td class="wide">a &lt; b</td>
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable


class Html(str):
    """Markup, to be put in as it is."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float | None) -> Html:
    """An element. `class_` is the attribute `class`, `stroke_width` is `stroke-width`; an attribute
    of None is left out.

    Raises:
        ValueError: a number is infinite or none, which no browser can draw.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{_value(value)}"')
    return Html(f"<{' '.join(words)}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """All parts one after the other."""
    return Html("".join(map(_text, parts)))


def short(value: float) -> str:
    """A number for a drawing: two places, no zeros at the end."""
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be drawn")
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text(part: str) -> str:
    return part if isinstance(part, Html) else html.escape(part)


def _value(value: str | float) -> str:
    return html.escape(value) if isinstance(value, str) else short(value)
