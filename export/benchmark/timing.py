"""Speed of engines beside each other: they take turns, round by round, on one machine.

A machine may be shared, so that seconds of one minute mean little in the next. What is believed are
ratios within a round, and their median over the rounds. Without torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.runtime.interface import Outputs

# Of a turn, so that fast engines are timed many times and slow ones once.
TURN_SECONDS = 0.3
_MOST_CALLS = 200


class Entrant(NamedTuple):
    """What is timed: clips in, their answers out."""

    name: str
    run: Callable[[NDArray[np.uint8]], Outputs | None]
    """None for what answers nothing, such as a limit."""
    multiply_adds: int | None
    """Of one clip; None where they are not known."""


class Turn(NamedTuple):
    """One entrant's calls in one round."""

    seconds: tuple[float, ...]
    cpu: float
    """Processor seconds of a call, of all threads together."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


class Timing(NamedTuple):
    """Of one entrant at one batch size."""

    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    clips_per_second: float
    multiply_adds_per_second: float | None


Turns = dict[tuple[str, int], list[Turn]]
"""By entrant and batch size, a turn for each round."""


def take_turns(
    entrants: Sequence[Entrant],
    clips: NDArray[np.uint8],
    batches: Sequence[int],
    rounds: int,
    *,
    turn_seconds: float = TURN_SECONDS,
    report: Callable[[str], None] = lambda step: None,
) -> Turns:
    """Times each entrant at each batch size, round by round, after a round to warm up.

    Args:
        clips: uint8 (clips, time, height, width, 3); repeated for batches that are larger.
        turn_seconds: of a turn; one call is made at least.
    """
    turns: Turns = {(each.name, batch): [] for batch in batches for each in entrants}
    for number in range(rounds + 1):
        report(f"round {number} of {rounds}" if number else "warming up")
        for batch in batches:
            frames = np.resize(clips, (batch, *clips.shape[1:]))
            for each in entrants:
                turn = _turn(each, frames, turn_seconds if number else 0)
                if number:
                    turns[each.name, batch].append(turn)
    return turns


def _turn(entrant: Entrant, frames: NDArray[np.uint8], turn_seconds: float) -> Turn:
    seconds: list[float] = []
    cpu = time.process_time()
    while not seconds or (sum(seconds) < turn_seconds and len(seconds) < _MOST_CALLS):
        start = time.perf_counter()
        entrant.run(frames)
        seconds.append(time.perf_counter() - start)
    return Turn(tuple(seconds), (time.process_time() - cpu) / len(seconds))


def timing(turns: Sequence[Turn], batch: int, multiply_adds: int | None) -> Timing:
    """Over all calls of all rounds."""
    seconds = np.array([each for turn in turns for each in turn.seconds])
    p50, p90, p99 = (float(value) * 1000 for value in np.percentile(seconds, (50, 90, 99)))
    rate = batch * len(seconds) / float(seconds.sum())
    return Timing(
        calls=len(seconds),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        clips_per_second=rate,
        multiply_adds_per_second=multiply_adds * rate if multiply_adds else None,
    )


def speed_up(of: Sequence[Turn], over: Sequence[Turn], *, cpu: bool = False) -> Quartiles:
    """How many times faster than another, in the same rounds; by processor time if asked for."""
    ratios = [
        (slow.cpu / fast.cpu) if cpu else (slow.median / fast.median)
        for fast, slow in zip(of, over, strict=True)
    ]
    return Quartiles(*(float(value) for value in np.percentile(ratios, (25, 50, 75))))
