"""What a video file really holds, as against what its headers say."""

from __future__ import annotations

import dataclasses

from av.video.frame import VideoFrame

from model.video.errors import TooFewFrames, UndecodableVideo
from model.video.index import PacketIndex
from model.video.opening import OpenVideo
from model.video.sampling import Timeline
from model.video.transforms import upright_turns

Shape = tuple[int, int, int]
"""Width and height as displayed, clockwise rotation."""

# A claim is called a lie when it is off by half and by more than a second: sound often outlasts
# the picture a little.
_CLAIM_FACTOR, _CLAIM_SLACK_S = 1.5, 1.0


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """What the file really holds, by its packets and one decoded frame, not by its headers.

    `width`, `height`: as displayed, after rotation and with square pixels. `rotation`: clockwise
    degrees that set the coded frames upright (0, 90, 180, 270). `frame_rate`: mean, by presentation
    times; None where they do not advance. `duration_s`: from the first frame to the end of the
    last, which is taken to stay as long as the median frame.
    """

    width: int
    height: int
    rotation: int
    frame_rate: float | None
    frames: int
    duration_s: float
    codec: str
    container: str


def is_reliable(video: OpenVideo, index: PacketIndex) -> bool:
    """Whether the times of packets are known to be those of frames.

    AVI stores no presentation times. FFmpeg guesses, and where frames are reordered guesses wrong.
    """
    guessed = video.format == "avi" and video.stream.codec_context.has_b_frames
    return index.orderly and len(index.frames) > 1 and not guessed


def displayed(frame: VideoFrame, sar: float) -> Shape:
    turns = upright_turns(frame.rotation)
    width, height = max(round(frame.width * sar), 1), frame.height
    if turns % 2:
        width, height = height, width
    return width, height, -90 * turns % 360


def facts_of(video: OpenVideo, shape: Shape, timeline: Timeline) -> VideoFacts:
    return VideoFacts(
        *shape,
        frame_rate=timeline.frame_rate,
        frames=len(timeline.times),
        duration_s=timeline.duration,
        codec=video.codec,
        container=video.format,
    )


def overclaims(video: OpenVideo, timeline: Timeline) -> bool:
    """Whether the headers promise far more than the file holds: it was cut off."""
    if video.claimed_frames > _CLAIM_FACTOR * len(timeline.times):
        return True
    longest = _CLAIM_FACTOR * timeline.duration + _CLAIM_SLACK_S
    return video.claimed_s is not None and video.claimed_s > longest


def nothing_decodes() -> UndecodableVideo:
    return UndecodableVideo("No frame of this video can be decoded; the file may be damaged.")


def single_frame() -> TooFewFrames:
    return TooFewFrames("This file holds a single frame; recognising an action takes a video.")
