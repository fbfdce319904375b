"""Which frames of a video a clip is made of: pure functions on presentation times, in seconds.

A `Timeline` goes in, indices of frames come out. Nothing here knows about files.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from model.config import Preprocessing, Sampling

TIMELINE_FPS = 30  # `frame_stride` counts frames of this timeline, whatever the file's own rate

# Matroska and FLV round times to a millisecond. Without slack, a frame meant for 1.0667 s and
# stored as 1.067 s would lose to its predecessor, and a remux would change what is sampled.
TIME_SLACK_S = 1e-3


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When each frame is shown.

    `times`: float64 (frames,), ascending seconds since the first frame, so `times[0] == 0`.
    """

    times: NDArray[np.float64]

    @property
    def frame_rate(self) -> float | None:
        """Mean frames a second between the first and the last one; None where no time passes."""
        return (len(self.times) - 1) / self.last if self.last > 0 else None

    @property
    def last(self) -> float:
        """When the last frame appears, in seconds after the first."""
        return float(self.times[-1])

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last.

        No container says reliably how long its last frame stays; here it stays as long as the
        median frame does.
        """
        if len(self.times) < 2:
            return 0.0
        return self.last + float(np.median(np.diff(self.times)))


def sample(
    timeline: Timeline, preprocessing: Preprocessing, views: int = 1
) -> tuple[NDArray[np.int64], Sampling]:
    """Chooses the frames of every temporal view.

    A video shorter than the span of a dense clip, from its first wanted time to its last
    (`(num_frames - 1) * frame_stride / 30` seconds), is sampled uniformly instead; frames repeat
    where there are fewer than `num_frames`.

    Returns:
        int64 (views, num_frames) indices into `timeline.times`, and the sampling that was used.
    """
    count = preprocessing.num_frames
    spacing = preprocessing.frame_stride / TIMELINE_FPS
    dense = preprocessing.sampling == "dense" and timeline.duration > (count - 1) * spacing
    if dense:
        return frames_at(timeline, dense_times(timeline.last, count, spacing, views)), "dense"
    return frames_at(timeline, uniform_times(timeline.duration, count, views)), "uniform"


def dense_times(last: float, count: int, spacing: float, views: int = 1) -> NDArray[np.float64]:
    """Wanted times of clips of `count` frames, `spacing` seconds apart.

    One view lies in the middle of the video. Of several, the first begins with the video, the last
    ends at the last frame (which appears at `last` seconds), the others lie evenly between.

    Returns:
        float64 (views, count), seconds since the first frame.
    """
    room = max(last - (count - 1) * spacing, 0.0)
    starts = np.array([room / 2]) if views == 1 else np.linspace(0.0, room, views)
    return starts[:, None] + np.arange(count) * spacing


def uniform_times(duration: float, count: int, views: int = 1) -> NDArray[np.float64]:
    """Wanted times when the video is cut in `count` equal segments, one frame each.

    One view takes the middle of each segment. Of `views`, number v takes the point
    `(v + 1/2) / views` of it, so that together they are the middles of `views * count` segments.

    Returns:
        float64 (views, count), seconds since the first frame.
    """
    within = (np.arange(views) + 0.5) / views
    return (np.arange(count)[None, :] + within[:, None]) * (duration / count)


def frames_at(timeline: Timeline, wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """The frame on screen at each wanted time: the last that appears at or before it.

    Returns:
        int64 indices into `timeline.times`, in the shape of `wanted`.
    """
    after = np.searchsorted(timeline.times, wanted + TIME_SLACK_S, side="right")
    return np.clip(after - 1, 0, len(timeline.times) - 1).astype(np.int64)
