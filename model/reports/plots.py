"""Pictures of a report as inline SVG: lines over steps, a confusion matrix, calibration.

Colours come from the page's style sheet, by class, so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.evaluation.metrics import Bin
from model.reports.html import Html, join, short, tag

_WIDTH, _HEIGHT = 440, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26  # around the plot: labels of the axes
_POINTS = 300  # of a line; longer ones are drawn as mean and range of as many stretches
_CELL, _LABEL_CHARACTERS = 24, 26


class Point(NamedTuple):
    """A stretch of steps: where it is, the mean of its values, and between what they are."""

    x: float
    mean: float
    low: float
    high: float


def line_chart(
    values: Sequence[tuple[float, float]],
    *,
    dots: bool = False,
    form: Callable[[float], str] = "{:g}".format,
) -> Html:
    """Values over steps; what is infinite or no number is left out.

    Args:
        values: (step, value), in the order of the steps.
        dots: marks every value, for lines of few.
        form: of the numbers at the vertical axis.
    """
    points = stretches([pair for pair in values if math.isfinite(pair[1])])
    if not points:
        return tag("p", "There is nothing to draw.", class_="soft")
    ticks = nice_ticks(min(p.low for p in points), max(p.high for p in points))
    steps = nice_ticks(points[0].x, points[-1].x)
    first, last = points[0].x, max(points[-1].x, points[0].x + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    grid = [
        tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(v), y2=y(v), class_="grid") for v in ticks
    ]
    grid += [_label(_LEFT - 6, y(v) + 4, form(v), "end") for v in ticks]
    grid += [_label(x(s), _HEIGHT - 8, f"{s:,.0f}") for s in steps if first <= s <= last]
    outline = [(x(p.x), y(p.high)) for p in points] + [(x(p.x), y(p.low)) for p in points[::-1]]
    drawn = [tag("path", d=_path(outline) + "Z", class_="range")] if len(points) > 1 else []
    drawn.append(tag("path", d=_path([(x(p.x), y(p.mean)) for p in points]), class_="line"))
    if dots or len(points) == 1:
        drawn += [
            tag(
                "circle",
                tag("title", f"step {p.x:,.0f}: {form(p.mean)}"),
                cx=x(p.x),
                cy=y(p.mean),
                r=3,
                class_="dot",
            )
            for p in points
        ]
    return _svg(_WIDTH, _HEIGHT, grid + drawn)


def stretches(values: Sequence[tuple[float, float]]) -> list[Point]:
    """At most `_POINTS` of equally many values each."""
    if not values:
        return []
    array = np.array(values, np.float64)
    parts = np.array_split(array, min(len(array), _POINTS))
    return [
        Point(float(x.mean()), float(y.mean()), float(y.min()), float(y.max()))
        for x, y in (part.T for part in parts)
    ]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers in equal distances, from at most `low` to at least `high`."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [number * distance for number in range(first, last + 1)]


def confusion_matrix(counts: NDArray[np.int64], labels: Sequence[str]) -> Html:
    """Counts (true, given) as a map: a row is a class, its shades are where its videos went."""
    size = len(labels)
    totals = np.maximum(counts.sum(1), 1)
    left = _CELL // 2 + 6 * max(min(len(label), _LABEL_CHARACTERS) for label in labels)
    top = left * 0.75
    parts = []
    for number, label in enumerate(labels):
        middle = (number + 0.5) * _CELL
        column = left + middle
        parts += [
            _label(left - 6, top + middle + 4, label, "end"),
            _label(
                column, top - 6, label, "start", f"rotate(-50 {short(column)} {short(top - 6)})"
            ),
        ]
    for true in range(size):
        for given in range(size):
            parts.append(
                tag(
                    "rect",
                    x=left + given * _CELL,
                    y=top + true * _CELL,
                    width=_CELL,
                    height=_CELL,
                    class_="cell",
                )
            )
            count = int(counts[true, given])
            if not count:
                continue
            share = count / totals[true]
            place = {"x": left + given * _CELL + 1, "y": top + true * _CELL + 1}
            parts += [
                tag(
                    "rect",
                    tag("title", f"{labels[true]} taken for {labels[given]}: {count}"),
                    **place,
                    width=_CELL - 2,
                    height=_CELL - 2,
                    fill_opacity=0.15 + 0.85 * share,
                    class_="right" if true == given else "wrong",
                ),
                _label(
                    left + (given + 0.5) * _CELL,
                    top + (true + 0.5) * _CELL + 4,
                    str(count),
                    kind="count strong" if share > 0.5 else "count",
                ),
            ]
    # Room for the last column's label, which leans to the right.
    return _svg(left + size * _CELL + left * 0.7, top + size * _CELL + 4, parts)


def reliability_diagram(bins: Sequence[Bin]) -> Html:
    """Accuracy of videos by how sure the model is of them; on the diagonal it is as right as it
    says. Below, how many videos there are of each confidence.
    """
    side, left, gap, low = 220, 44, 30, 48
    width, height = left + side + 12, side + gap + low + 34
    most = max((each.videos for each in bins), default=1)
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        level = 10 + side * (1 - share)
        parts += [
            tag("line", x1=left, x2=left + side, y1=level, y2=level, class_="grid"),
            _label(left - 6, level + 4, f"{share:.0%}", "end"),
            _label(left + side * share, 10 + side + 18, f"{share:.0%}"),
        ]
    for each in bins:
        box = {"x": left + side * each.low + 1, "width": side * (each.high - each.low) - 2}
        bar, count = side * each.accuracy, low * each.videos / most
        words = (
            f"{each.videos} videos of {each.low:.0%} to {each.high:.0%}: "
            f"{each.accuracy:.1%} right, {each.confidence:.1%} sure"
        )
        foot = side + gap + low + 10
        parts += [
            tag("rect", tag("title", words), **box, y=10 + side - bar, height=bar, class_="bar"),
            tag("rect", tag("title", words), **box, y=foot - count, height=count, class_="count"),
            tag(
                "circle",
                cx=left + side * each.confidence,
                cy=10 + side - bar,
                r=3,
                class_="dot",
            ),
        ]
    parts += [
        tag("line", x1=left, y1=10 + side, x2=left + side, y2=10, class_="ideal"),
        _label(left - 6, side + gap + low + 10, "videos", "end"),
        _label(left + side / 2, height - 6, "score"),
    ]
    return _svg(width, height, parts)


def share_bar(share: float) -> Html:
    """A bar in a cell of a table."""
    return tag("span", tag("span", style=f"width:{100 * share:.1f}%"), class_="share")


def _label(
    x: float,
    y: float,
    text: str,
    anchor: str = "middle",
    transform: str | None = None,
    kind: str = "label",
) -> Html:
    shown = text if len(text) <= _LABEL_CHARACTERS else text[: _LABEL_CHARACTERS - 1] + "…"
    whole = [] if shown == text else [tag("title", text)]
    return tag(
        "text", shown, *whole, x=x, y=y, text_anchor=anchor, transform=transform, class_=kind
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{short(x)} {short(y)}" for x, y in points)


def _svg(width: float, height: float, parts: Sequence[Html]) -> Html:
    box = f"0 0 {short(width)} {short(height)}"
    return tag("svg", join(parts), viewBox=box, width=width, height=height, role="img")
