"""From the scores of overlapping windows to segments: stretches of a video that have one label.

The rule, for each label on its own:

1. A window speaks for the stretch between the middles to its neighbours' centres, so that the
   windows tile the video.
2. Scores are smoothed: the mean of a window and its neighbours, `smoothing` windows in all.
3. A segment is a run of windows whose smoothed score is at least `close_score` and at one of them
   at least `open_score` (hysteresis: one dip or peak neither ends nor makes a segment).
4. Segments shorter than `min_segment` seconds are dropped.
5. Its score is the mean of its windows' own scores, not smoothed.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Rule(NamedTuple):
    """How windows become segments."""

    smoothing: int
    open_score: float
    close_score: float
    min_segment_s: float


class Segment(NamedTuple):
    start_s: float
    end_s: float
    class_index: int
    score: float
    windows: int


class _Seen(NamedTuple):
    start_s: float
    end_s: float
    scores: NDArray[np.float64]

    @property
    def centre_s(self) -> float:
        return (self.start_s + self.end_s) / 2


class Segmenter:
    """Takes windows in their order and gives segments as they end; its memory does not grow."""

    def __init__(self, classes: int, rule: Rule) -> None:
        self._rule = rule
        self._reach = rule.smoothing // 2
        self._recent: deque[_Seen] = deque()
        self._next = 0  # position in `_recent` of the window to be judged next
        self._begun = np.full(classes, np.nan)  # start of the run that each label is in
        self._sure = np.zeros(classes, np.bool_)  # the run has reached `open_score`
        self._sum = np.zeros(classes)
        self._count = np.zeros(classes, np.int64)

    def add(self, start_s: float, end_s: float, scores: NDArray[np.float64]) -> list[Segment]:
        """Takes the next window, with its score for each class; returns segments that ended."""
        self._recent.append(_Seen(start_s, end_s, scores))
        # Judged once its neighbours are known: the smoothing's, and one to share the time with.
        if len(self._recent) - 1 - self._next < max(self._reach, 1):
            return []
        ended = self._judge()
        while self._next > max(self._reach, 1):
            self._recent.popleft()
            self._next -= 1
        return ended

    def finish(self) -> list[Segment]:
        """What the end of the video ends."""
        ended: list[Segment] = []
        while self._next < len(self._recent):
            ended += self._judge()
        if self._recent:
            ended += self._end(~np.isnan(self._begun), self._recent[-1].end_s)
        return ended

    def _judge(self) -> list[Segment]:
        here = self._next
        near = [seen.scores for seen in self._recent]
        smoothed = np.mean(near[max(here - self._reach, 0) : here + self._reach + 1], axis=0)
        window = self._recent[here]
        start_s = window.start_s
        if here > 0:
            start_s = (self._recent[here - 1].centre_s + window.centre_s) / 2
        high = smoothed >= self._rule.close_score
        running = ~np.isnan(self._begun)
        ended = self._end(running & ~high, start_s)
        self._begun[high & ~running] = start_s
        self._sure |= high & (smoothed >= self._rule.open_score)
        self._sum[high] += window.scores[high]
        self._count[high] += 1
        self._next += 1
        return ended

    def _end(self, which: NDArray[np.bool_], end_s: float) -> list[Segment]:
        ended = []
        for index in np.flatnonzero(which):
            begun, count = float(self._begun[index]), int(self._count[index])
            if self._sure[index] and end_s - begun >= self._rule.min_segment_s:
                score = float(self._sum[index]) / count
                ended.append(Segment(begun, end_s, int(index), score, count))
        self._begun[which] = np.nan
        self._sure[which] = False
        self._sum[which] = 0
        self._count[which] = 0
        return ended
