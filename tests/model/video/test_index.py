"""What the packets alone tell, and when they are not to be believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import av
import pytest

from model.video import Limits, VideoTooLarge
from model.video.index import PacketIndex, scan_packets
from model.video.opening import open_video

from .numbered_video import write_video

Packets: TypeAlias = "list[av.Packet[av.VideoStream]]"


def scan_changed(path: Path, change: Callable[[Packets], object]) -> PacketIndex:
    """The index of a file whose packets were changed on the way."""
    with open_video(path, Limits()) as video:
        packets = list(video.container.demux(video.stream))
        change(packets)
        container: Any = SimpleNamespace(demux=lambda _: iter(packets))
        return scan_packets(dataclasses.replace(video, container=container), Limits())


def same_time(packets: Packets) -> None:
    packets[5].pts = packets[6].pts


def no_time(packets: Packets) -> None:
    packets[5].pts = None


def time_goes_back(packets: Packets) -> None:
    packets[5].dts = packets[2].dts


@pytest.mark.parametrize("change", [same_time, no_time, time_goes_back])
def test_times_that_contradict_each_other_are_not_trusted(
    tmp_path: Path, change: Callable[[Packets], object]
) -> None:
    path = write_video(tmp_path / "clip.mp4", 30, options={"bf": "0"})
    assert scan_changed(path, lambda _: None).orderly
    assert not scan_changed(path, change).orderly


def test_times_near_the_ends_of_64_bits_are_too_long_not_negative(tmp_path: Path) -> None:
    def far_apart(packets: Packets) -> None:
        packets[0].pts, packets[1].pts = -(2**63) + 1, 2**63 - 1

    with pytest.raises(VideoTooLarge):
        scan_changed(write_video(tmp_path / "clip.mp4", 30), far_apart)


def test_frames_are_in_order_of_presentation(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 30, options={"bf": "3"})
    index = scan_changed(path, lambda _: None)
    assert sorted(index.frames) == list(range(30))
    assert list(index.frames) != list(range(30))
    assert index.timeline.times * 30 == pytest.approx(range(30))
