"""Reads every video of a list once, before training does: what cannot be decoded, is too short, or
is there twice; how many of each class; and the list without them. No torch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from model.config import Preprocessing
from model.data.lists import Sample, VideoList
from model.data.process_pool import in_processes
from model.data.remote import local_video
from model.training.errors import MissingVideo, UnreachableVideo
from model.video import VideoError, load_clips
from model.video.sampling import TIMELINE_FPS

Kind = Literal["unreadable", "undecodable", "too_short", "duplicate", "contradictory"]

_VIEWS = 3  # the beginning, the middle and the end must decode


class Problem(NamedTuple):
    """Why a video is not in the clean list. `line` counts the samples of the list from 1."""

    line: int
    path: str
    kind: Kind
    detail: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found: problems in the order of the list, and the list without them.

    `truncated` counts the videos that end early or are damaged in parts, and can be used.
    """

    videos: int
    problems: tuple[Problem, ...]
    truncated: int
    duration_s: float
    clean: VideoList


class _Facts(NamedTuple):
    """Of one file. `error` is a kind and a sentence; where there is one, the rest is void."""

    sha256: str = ""
    duration_s: float = 0.0
    frames: int = 0
    truncated: bool = False
    error: tuple[Kind, str] | None = None


def check(
    videos: VideoList,
    preprocessing: Preprocessing,
    *,
    processes: int = 0,
    keep_short: bool = False,
    done: Callable[[int], object] = lambda count: None,
) -> Report:
    """Decodes every video in three places, and compares contents.

    Too short is a video that does not last as long as a dense clip spans, or has fewer frames than
    a uniform clip; it would be sampled all the same, with slower motion or repeated frames. Of
    files with the same bytes and label the first is kept; where labels differ, none.

    Args:
        processes: that decode; 0 decodes here.
        keep_short: too short is no problem.
        done: told how many videos have been read.
    """
    look = functools.partial(_look, preprocessing=preprocessing)
    answers = in_processes(look, videos.samples, processes, crashed=_crashed)
    facts = []
    for count, answer in enumerate(answers, start=1):
        facts.append(answer)
        done(count)
    problems = tuple(_problems(videos, facts, preprocessing, keep_short))
    bad = {problem.line for problem in problems}
    clean = tuple(sample for line, sample in enumerate(videos.samples, start=1) if line not in bad)
    return Report(
        videos=len(facts),
        problems=problems,
        truncated=sum(each.truncated for each in facts),
        duration_s=sum(each.duration_s for each in facts),
        clean=dataclasses.replace(videos, samples=clean),
    )


def _look(sample: Sample, preprocessing: Preprocessing) -> _Facts:
    try:
        with local_video(sample.path) as path:
            with Path(path).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            clips = load_clips(path, preprocessing, views=_VIEWS)
    except OSError as error:
        return _Facts(error=("unreadable", f"{error.strerror}."))
    except (MissingVideo, UnreachableVideo) as error:
        return _Facts(error=("unreadable", str(error)))
    except VideoError as error:
        return _Facts(error=("undecodable", str(error)))
    return _Facts(sha256, clips.facts.duration_s, clips.facts.frames, clips.truncated)


def _crashed(sample: Sample) -> _Facts:
    return _Facts(error=("undecodable", "It crashes the decoder."))


def _problems(
    videos: VideoList, facts: list[_Facts], preprocessing: Preprocessing, keep_short: bool
) -> Iterator[Problem]:
    labels: dict[str, set[int]] = collections.defaultdict(set)
    first: dict[str, str] = {}
    for sample, each in zip(videos.samples, facts, strict=True):
        labels[each.sha256].add(sample.label)
    for line, (sample, each) in enumerate(zip(videos.samples, facts, strict=True), start=1):
        found = each.error
        if found is None and len(labels[each.sha256]) > 1:
            names = ", ".join(videos.labels[label] for label in sorted(labels[each.sha256]))
            found = ("contradictory", f"The same file is labelled {names}.")
        if found is None and not keep_short:
            found = _too_short(each, preprocessing)
        if found is None and each.sha256 in first:
            found = ("duplicate", f"It is the same as {first[each.sha256]}.")
        if found is None:
            first[each.sha256] = sample.path
        else:
            yield Problem(line, sample.path, *found)


def _too_short(facts: _Facts, preprocessing: Preprocessing) -> tuple[Kind, str] | None:
    if preprocessing.sampling == "uniform":
        if facts.frames >= preprocessing.num_frames:
            return None
        wanted = preprocessing.num_frames
        return "too_short", f"It has {facts.frames} frames, a clip {wanted}."
    span = (preprocessing.num_frames - 1) * preprocessing.frame_stride / TIMELINE_FPS
    if facts.duration_s > span:
        return None
    return "too_short", f"It lasts {facts.duration_s:.2f} s, a clip {span:.2f} s."
