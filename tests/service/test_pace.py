"""How slowly a body may come, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from service.errors import UploadTimeoutError
from service.pace import Pace, Watch
from service.settings import load_settings
from tests.service.stepped import VirtualLoop, run

SETTINGS = load_settings(min_upload_rate=100, upload_timeout_s=600, long_upload_timeout_s=600)
SHORT, LONG = Pace.of(SETTINGS), Pace.of_long(SETTINGS)


async def passes(loop: VirtualLoop, seconds: float) -> None:
    loop.now += seconds
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("pace", "stall_s"), [(SHORT, 16), (LONG, 61)])
def test_a_stall_as_long_as_the_window_ends_an_upload(pace: Pace, stall_s: float) -> None:
    async def body(loop: VirtualLoop) -> None:
        async with Watch(pace) as watch:
            watch.note(1_000_000)
            await passes(loop, stall_s)

    with pytest.raises(UploadTimeoutError, match="100 bytes a second"):
        run(body)


@pytest.mark.parametrize(("pace", "stall_s"), [(SHORT, 14), (LONG, 59)])
def test_a_shorter_one_does_not_however_often(pace: Pace, stall_s: float) -> None:
    async def body(loop: VirtualLoop) -> None:
        async with Watch(pace) as watch:
            for _ in range(5):
                await passes(loop, stall_s)
                watch.note(1_000_000)

    run(body)


def test_time_on_our_side_does_not_count_for_the_rate() -> None:
    async def body(loop: VirtualLoop) -> None:
        async with Watch(SHORT) as watch:
            await passes(loop, 10)
            with watch.paused():
                await passes(loop, 100)
            await passes(loop, 4)
            watch.note(1_000_000)

    run(body)


def test_but_it_does_for_all_of_the_upload() -> None:
    async def body(loop: VirtualLoop) -> None:
        async with Watch(SHORT) as watch:
            with watch.paused():
                await passes(loop, 601)

    with pytest.raises(UploadTimeoutError, match="complete after 600 s"):
        run(body)
