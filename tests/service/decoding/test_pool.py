"""The pool of decoders: the right clips come back, and no file harms more than its decoder."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import Preprocessing
from model.video import Cut, Ended, Opened, load_clips
from service.decoding.messages import DecodeRequest, DecoderLimits, StreamRequest
from service.decoding.pool import DecoderPool
from service.decoding.process import DecoderProcess
from service.errors import DecoderUnavailableError, QueueFullError, VideoRejectedError
from tests.service.decoding.conftest import LIMITS, SEEN


def with_pool(
    body: Callable[[DecoderPool], Awaitable[object]],
    limits: DecoderLimits = LIMITS,
    workers: int = 1,
    **options: Any,
) -> list[str]:
    """Runs `body` with a pool; returns the reasons of the restarts."""
    restarts: list[str] = []

    async def run() -> None:
        pool = DecoderPool(workers, limits, restarts.append, **options)
        await pool.start()
        try:
            await body(pool)
        finally:
            pool.close()

    asyncio.run(asyncio.wait_for(run(), 240))
    return restarts


def request(video: Path, views: int = 1) -> DecodeRequest:
    return DecodeRequest(video, SEEN, views, 1)


def long_request(video: Path) -> StreamRequest:
    """Its windows, of 2.4 MB each, do not fit the pipe."""
    seen = Preprocessing(num_frames=16, image_size=224, frame_stride=1)
    return StreamRequest(video, seen, Cut(0.5, 0.5), LIMITS.video)


def pids(pool: DecoderPool) -> list[int]:
    processes = [decoder._process for decoder in pool._decoders]
    return [process.pid for process in processes if process is not None and process.pid]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it is of another process
        await asyncio.sleep(0.01)


def kill_decoder(pool: DecoderPool) -> None:
    """Ends the pool's one decoder and waits until it has ended."""
    (decoder,) = pool._decoders
    assert decoder._process is not None
    decoder._process.kill()
    decoder._process.join()


async def begin(pool: DecoderPool, video: Path) -> asyncio.Task[Any]:
    """Sends the pool's one decoder a video that it does not open, because it is stopped."""
    os.kill(pids(pool)[0], signal.SIGSTOP)
    task = asyncio.create_task(pool.decode(request(video)))
    await until(lambda: pool._decoders[0].decoded == 1)
    return task


def test_clips_of_a_decoder_are_those_decoded_here(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        clips = await pool.decode(DecodeRequest(video, SEEN, views=2, crops=3))
        here = load_clips(video, SEEN, views=2, crops=3)
        assert clips.frames.shape == (6, 4, 32, 32, 3)
        assert np.array_equal(clips.frames, here.frames)
        assert np.array_equal(clips.times, here.times)
        assert clips.facts == here.facts

    assert with_pool(body) == []


def test_rejected_video_keeps_its_decoder(video: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no video at all, only words")

    async def body(pool: DecoderPool) -> None:
        before = pids(pool)
        with pytest.raises(VideoRejectedError) as rejection:
            await pool.decode(request(broken))
        assert rejection.value.code in {"unsupported_format", "undecodable_video"}
        await pool.decode(request(video))
        assert pids(pool) == before

    assert with_pool(body) == []


def test_crashed_decoder_is_spawned_again_and_only_its_request_fails(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = DecoderProcess.begin

    def killed(decoder: DecoderProcess, *arguments: Any) -> None:
        begin(decoder, *arguments)
        assert decoder._process is not None
        decoder._process.kill()

    async def body(pool: DecoderPool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(DecoderProcess, "begin", killed)
            with pytest.raises(VideoRejectedError) as rejection:
                await pool.decode(DecodeRequest(video, SEEN, 60, 3))
        assert rejection.value.code == "decoder_crashed"
        assert len((await pool.decode(request(video))).frames) == 1
        # A layout of its own: the forked ones have the one that the file has seen.
        (pid,) = pids(pool)
        assert b"spawn_main" in command_of(pid)

    assert with_pool(body) == ["decoder_crashed"]


def test_decoder_that_dies_before_it_opens_the_file_is_replaced_for_the_request(
    video: Path,
) -> None:
    async def body(pool: DecoderPool) -> None:
        task = await begin(pool, video)
        os.kill(pids(pool)[0], signal.SIGKILL)
        assert len((await task).frames) == 1

    assert with_pool(body) == ["decoder_died"]


def test_decoders_that_die_again_and_again_are_a_503(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = DecoderProcess._start_once

    def short_lived(decoder: DecoderProcess) -> None:
        once(decoder)
        assert decoder._process is not None
        decoder._process.kill()
        decoder._connection.poll(60)  # until it has ended, so that the request is lost

    async def body(pool: DecoderPool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(DecoderProcess, "_start_once", short_lived)
            kill_decoder(pool)
            with pytest.raises(DecoderUnavailableError):
                await pool.decode(request(video))
        assert len((await pool.decode(request(video))).frames) == 1

    assert set(with_pool(body)) == {"decoder_died"}


def test_decoder_that_cannot_be_started_is_a_503_and_leaves_no_file_open(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(process: ForkServerProcess) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    async def body(pool: DecoderPool) -> None:
        kill_decoder(pool)
        with monkeypatch.context() as patch:
            patch.setattr(ForkServerProcess, "start", fails)
            before = open_files()
            for _ in range(3):
                with pytest.raises(DecoderUnavailableError) as caught:
                    await pool.decode(request(video))
                assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "5"})
            assert open_files() <= before
        assert len((await pool.decode(request(video))).frames) == 1

    assert with_pool(body) == ["decoder_died"]


def test_decoder_that_ends_while_it_starts_is_started_again(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = DecoderProcess._start_once
    starts: list[None] = []

    def ends_at_first(decoder: DecoderProcess) -> None:
        starts.append(None)
        if len(starts) == 1:
            raise EOFError
        once(decoder)

    monkeypatch.setattr(DecoderProcess, "_start_once", ends_at_first)

    async def body(pool: DecoderPool) -> None:
        await pool.decode(request(video))

    assert with_pool(body) == []
    assert len(starts) == 2


@pytest.mark.parametrize("long", [False, True])
def test_decoder_that_hangs_is_replaced_after_the_time_limit(video: Path, long: bool) -> None:
    async def body(pool: DecoderPool) -> None:
        (before,) = pids(pool)
        if long:
            async with pool.stream(long_request(video)) as messages:
                assert isinstance(await anext(messages), Opened)
                os.kill(before, signal.SIGSTOP)
                pool._decoders[0]._limits = LIMITS._replace(timeout_s=0.5)
                with pytest.raises(VideoRejectedError) as rejection:
                    _ = [message async for message in messages]
        else:
            os.kill(before, signal.SIGSTOP)
            pool._decoders[0]._limits = LIMITS._replace(timeout_s=0.5)
            with pytest.raises(VideoRejectedError) as rejection:
                await pool.decode(request(video))
        assert rejection.value.code == "decoding_timeout"
        await until(lambda: pool.busy == 0)
        assert pids(pool) != [before]

    assert with_pool(body) == ["decoding_timeout"]


@pytest.mark.parametrize("long", [False, True])
def test_abandoned_video_has_its_decoder_killed_and_replaced(video: Path, long: bool) -> None:
    async def body(pool: DecoderPool) -> None:
        (before,) = pids(pool)
        if long:
            async with pool.stream(long_request(video)) as messages:
                assert isinstance(await anext(messages), Opened)
        else:
            task = await begin(pool, video)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            assert pool.busy == 1
        await until(lambda: pool.busy == 0)
        assert pids(pool) != [before]
        assert len((await pool.decode(request(video))).frames) == 1

    assert with_pool(body) == [], "an abandoned video is no failure of its decoder"


def test_requests_cancelled_at_any_moment_leave_the_pool_whole(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        for moment in range(30):
            task = asyncio.create_task(pool.decode(request(video)))
            for _ in range(moment % 6):
                await asyncio.sleep(0)
            if moment % 5 == 4:
                await asyncio.sleep(0.005 * moment)
            task.cancel()
        assert len((await pool.decode(request(video))).frames) == 1
        await until(lambda: pool.busy == 0)

    assert with_pool(body) == []


def test_long_video_comes_in_windows_and_its_decoder_goes_on(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        before = pids(pool)
        async with pool.stream(long_request(video)) as messages:
            opened, *windows, ended = [message async for message in messages]
        assert isinstance(opened, Opened)
        assert isinstance(ended, Ended)
        assert len(windows) == ended.windows == opened.windows
        assert len((await pool.decode(request(video))).frames) == 1
        assert pids(pool) == before

    assert with_pool(body) == []


def test_two_decoders_work_side_by_side_and_the_third_video_waits(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        assert (pool.busy, pool.waiting) == (0, 0)
        tasks = [asyncio.create_task(pool.decode(request(video, views))) for views in (1, 2, 3, 1)]
        await asyncio.sleep(0)
        assert (pool.busy, pool.waiting) == (2, 2)
        tasks.pop().cancel()
        assert [len(clips.frames) for clips in await asyncio.gather(*tasks)] == [1, 2, 3]
        assert pool.waiting == 0
        assert sum(decoder.decoded for decoder in pool._decoders) == 3, "a cancelled one is not"

    assert with_pool(body, workers=2) == []


def test_more_videos_than_may_wait_are_rejected(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        jobs = [asyncio.create_task(pool.decode(request(video))) for _ in range(3)]
        await asyncio.sleep(0)
        assert (pool.busy, pool.waiting) == (1, 2)
        with pytest.raises(QueueFullError) as caught:
            await pool.decode(request(video))
        assert int(caught.value.headers["Retry-After"]) >= 1
        with pytest.raises(QueueFullError):
            pool.check_room()
        await asyncio.gather(*jobs)
        pool.check_room()

    assert with_pool(body, max_waiting=2) == []


def test_acquired_decoder_that_is_not_used_is_released(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        with pytest.raises(QueueFullError):
            async with pool.acquire():
                raise QueueFullError(1)
        async with pool.acquire() as decode:
            assert pool.busy == 1
            assert len((await decode(request(video))).frames) == 1
            await until(lambda: pool.busy == 0)

    assert with_pool(body) == []


def test_worn_decoder_is_replaced(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.decoding.pool._RECYCLE_AFTER", 2)

    async def body(pool: DecoderPool) -> None:
        before = pids(pool)
        await pool.decode(request(video))
        await until(lambda: pool.busy == 0)
        assert pids(pool) == before
        await pool.decode(request(video))
        await until(lambda: pool.busy == 0)
        assert pids(pool) != before

    assert with_pool(body) == []


def test_closed_pool_leaves_no_decoder_behind(video: Path) -> None:
    of_others = multiprocessing.active_children()

    async def body(pool: DecoderPool) -> None:
        await begin(pool, video)

    assert with_pool(body) == []
    assert set(multiprocessing.active_children()) <= set(of_others)
