"""A long video as overlapping windows, one after the other while it is decoded.

Memory does not grow with the length of the video, but for its index: 20 bytes a frame.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from model.config import Preprocessing
from model.video.errors import VideoTooLarge
from model.video.facts import (
    Shape,
    VideoFacts,
    displayed,
    facts_of,
    is_reliable,
    nothing_decodes,
    overclaims,
    single_frame,
)
from model.video.index import scan_packets
from model.video.opening import Limits, OpenVideo, open_video
from model.video.sampling import (
    TIME_SLACK_S,
    TIMELINE_FPS,
    Timeline,
    frames_at,
    uniform_times,
)
from model.video.selective import Tick, decode_at
from model.video.sequential import take_survey
from model.video.transforms import Crops, crop_frame

MAX_OVERLAP = 8
"""Windows that may show the same moment; the frames of so many are held at a time."""


class WindowError(ValueError):
    """A window or a stride that cannot be used; the message says what can."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        """`window` or `stride`."""
        self.message = message


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a video is cut into windows.

    `window_s`: seconds that one window shows; `stride_s`: from the start of one to that of the
    next; `max_windows`: a video that gives more is refused.
    """

    window_s: float
    stride_s: float
    crops: Crops = 1
    max_windows: int = 100_000


def make_cut(
    preprocessing: Preprocessing,
    window_s: float | None = None,
    stride_s: float | None = None,
    crops: Crops = 1,
    max_windows: int = 100_000,
) -> Cut:
    """A cut with what is left open filled in: the span of the model's own clips, and half of it.

    Raises:
        WindowError: the model has no span of its own, or the stride leaves gaps or too many
            windows over each moment.
    """
    if window_s is None:
        if preprocessing.sampling != "dense":
            raise WindowError(
                "window",
                "this model looks at whole videos and has no clip length of its own; "
                "say how many seconds a window shows",
            )
        window_s = preprocessing.num_frames * preprocessing.frame_stride / TIMELINE_FPS
    stride_s = window_s / 2 if stride_s is None else stride_s
    if not window_s / MAX_OVERLAP - 1e-9 <= stride_s <= window_s:
        raise WindowError(
            "stride",
            f"{stride_s:g} s does not fit windows of {window_s:g} s; it may be "
            f"{window_s / MAX_OVERLAP:g} to {window_s:g} s",
        )
    return Cut(window_s, stride_s, crops, max_windows)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The windows of one video.

    `starts`, `ends`: float64 (windows,), seconds since the first frame. `indices`: int64 (windows,
    time), frames of the timeline.
    """

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    indices: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a video, and what the network sees of it.

    `frames`: uint8 (crops, time, size, size, 3), RGB; `times`: when each is shown.
    """

    number: int
    start_s: float
    end_s: float
    times: tuple[float, ...]
    frames: NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Opened:
    """What is known of a video before its first window; damage may make it less."""

    facts: VideoFacts
    windows: int


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a video turned out to be. `truncated`: as of `Clips`."""

    facts: VideoFacts
    windows: int
    truncated: bool


def plan_windows(timeline: Timeline, preprocessing: Preprocessing, cut: Cut) -> Plan:
    """Where the windows lie and which frames they show.

    The first begins with the video, each next a stride later, and the last ends with the video. A
    window takes its frames at even distances: from its start for a model of `dense` sampling, so
    that one of the model's own span is a clip as `sample` takes it, and from the middles of equal
    segments for one of `uniform` sampling. A video shorter than a window is one window.

    Raises:
        VideoTooLarge: there are more than `cut.max_windows`.
    """
    count = preprocessing.num_frames
    duration = timeline.duration
    if duration <= cut.window_s:
        indices = frames_at(timeline, uniform_times(duration, count))
        return Plan(np.zeros(1), np.array([duration]), indices)
    spacing = cut.window_s / count
    dense = preprocessing.sampling == "dense"
    within = (np.arange(count) + (0.0 if dense else 0.5)) * spacing
    starts = _starts(duration - cut.window_s, cut)
    indices = frames_at(timeline, starts[:, None] + within)
    return Plan(starts, starts + cut.window_s, indices)


def _starts(room: float, cut: Cut) -> NDArray[np.float64]:
    count = int(room / cut.stride_s) + 2
    if count > cut.max_windows:
        raise VideoTooLarge(
            f"The video gives about {count:,} windows, a stride of {cut.stride_s:g} s apart; at "
            f"most {cut.max_windows:,} are looked at. Choose a longer stride."
        )
    starts = np.arange(count) * cut.stride_s
    return np.append(starts[starts < room - TIME_SLACK_S], room)


def stream_windows(
    path: str | Path,
    preprocessing: Preprocessing,
    cut: Cut,
    emit: Callable[[Opened | Window], None],
    *,
    tick: Tick = lambda: None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Ended:
    """Decodes a local video file once, telling `emit` of `Opened` and then of each window in turn.

    Of a sound file only what the windows depend on is decoded. Where something looks wrong the file
    is read from end to end twice, to learn what decodes and then to give the windows that are still
    missing; so a damaged file takes up to three times as long.

    Args:
        emit: what it raises ends the decoding.
        tick: called after each decoded frame: there is progress.
    Raises:
        VideoError: as `load_clips`; some windows may have been given by then.
    """

    def give(piece: Opened | Window) -> None:
        try:
            emit(piece)
        except Exception as error:
            raise _ReceiverError(error) from error

    try:
        return _stream(path, preprocessing, cut, give, tick, limits)
    except _ReceiverError as error:
        raise error.cause from None


class _ReceiverError(Exception):
    """What a receiver of windows raised: nothing that is wrong with the file."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _stream(
    path: str | Path,
    preprocessing: Preprocessing,
    cut: Cut,
    emit: Callable[[Opened | Window], None],
    tick: Tick,
    limits: Limits,
) -> Ended:
    given = 0
    with open_video(path, limits) as video:
        index = scan_packets(video, limits)
        if is_reliable(video, index):
            plan = plan_windows(index.timeline, preprocessing, cut)
            reel = _Reel(video, preprocessing, cut, plan, index.timeline, emit)
            with contextlib.suppress(LookupError):  # frames came in no order that windows are in
                if decode_at(video, index, np.unique(plan.indices), reel.keep, tick):
                    return reel.finish(index.damaged)
            given = reel.given
    with open_video(path, limits) as video:
        survey = take_survey(video, {}, lambda number, frame: None, tick)
    if len(survey.order) < 2:
        raise single_frame() if len(survey.order) else nothing_decodes()
    plan = plan_windows(survey.timeline, preprocessing, cut)
    wanted = np.unique(plan.indices[given:])
    positions = {int(survey.order[number]): int(number) for number in wanted}
    with open_video(path, limits) as video:
        reel = _Reel(video, preprocessing, cut, plan, survey.timeline, emit, given)
        take_survey(video, positions, reel.keep, tick)
        return reel.finish(survey.damaged)


class _Reel:
    """Holds the frames that windows still need, and gives each window as its last frame comes."""

    def __init__(
        self,
        video: OpenVideo,
        preprocessing: Preprocessing,
        cut: Cut,
        plan: Plan,
        timeline: Timeline,
        emit: Callable[[Opened | Window], None],
        given: int = 0,
    ) -> None:
        self.given = given
        self._video = video
        self._size = preprocessing.image_size
        self._crops = cut.crops
        self._plan = plan
        self._timeline = timeline
        self._emit = emit
        self._pictures: dict[int, NDArray[np.uint8]] = {}
        self._shape: Shape | None = None

    def keep(self, number: int, frame: VideoFrame) -> None:
        if self._shape is None:
            self._shape = displayed(frame, self._video.sar)
        self._pictures[number] = crop_frame(frame, self._size, self._crops, self._video.sar)
        while self.given < len(self._plan.starts) and self._plan.indices[self.given, -1] <= number:
            if self.given == 0:
                self._emit(Opened(self._facts(), len(self._plan.starts)))
            self._emit(self._window(self.given))
            self.given += 1
            self._forget()

    def finish(self, damaged: bool) -> Ended:
        if self.given < len(self._plan.starts):
            raise nothing_decodes()
        truncated = damaged or overclaims(self._video, self._timeline)
        return Ended(self._facts(), self.given, truncated)

    def _facts(self) -> VideoFacts:
        if self._shape is None:
            raise nothing_decodes()
        return facts_of(self._video, self._shape, self._timeline)

    def _window(self, number: int) -> Window:
        indices = self._plan.indices[number]
        return Window(
            number=number,
            start_s=float(self._plan.starts[number]),
            end_s=float(self._plan.ends[number]),
            times=tuple(self._timeline.times[indices].tolist()),
            frames=np.stack([self._pictures[index] for index in indices.tolist()], axis=1),
        )

    def _forget(self) -> None:
        """Lets go of the frames before the next window."""
        if self.given < len(self._plan.starts):
            first = int(self._plan.indices[self.given, 0])
            for number in [number for number in self._pictures if number < first]:
                del self._pictures[number]
