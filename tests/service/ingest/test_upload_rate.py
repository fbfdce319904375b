"""How slowly a body may come, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from service.errors import UploadTimeoutError
from service.ingest.upload_rate import Pace, Watch
from service.settings import load_settings
from tests.service.inference.stepped import VirtualLoop, virtual

SETTINGS = load_settings(min_upload_rate=100, upload_timeout_s=600, long_upload_timeout_s=600)
SHORT, LONG = Pace.of(SETTINGS), Pace.of_long(SETTINGS)


async def passes(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.now += seconds
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("pace", "stall_s"), [(SHORT, 16), (LONG, 61)])
@virtual
async def test_a_stall_as_long_as_the_window_ends_an_upload(pace: Pace, stall_s: float) -> None:
    with pytest.raises(UploadTimeoutError, match="100 bytes a second"):  # noqa: PT012 - a sync block
        async with Watch(pace) as watch:
            watch.note(1_000_000)
            await passes(stall_s)


@pytest.mark.parametrize(("pace", "stall_s"), [(SHORT, 14), (LONG, 59)])
@virtual
async def test_a_shorter_one_does_not_however_often(pace: Pace, stall_s: float) -> None:
    async with Watch(pace) as watch:
        for _ in range(5):
            await passes(stall_s)
            watch.note(1_000_000)


@virtual
async def test_time_on_our_side_does_not_count_for_the_rate() -> None:
    async with Watch(SHORT) as watch:
        await passes(10)
        with watch.paused():
            await passes(100)
        await passes(4)
        watch.note(1_000_000)


@virtual
async def test_but_it_does_for_all_of_the_upload() -> None:
    with pytest.raises(UploadTimeoutError, match="complete after 600 s"):  # noqa: PT012 - a sync block
        async with Watch(SHORT) as watch:
            with watch.paused():
                await passes(601)
