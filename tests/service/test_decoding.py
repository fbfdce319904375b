"""Decoder workers: the right clips come back, and nothing a file does reaches the pool."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from model.config import Preprocessing
from model.video import Cut, Limits, VideoFacts, load_clips
from service.decoder import (
    _BEGUN,
    Job,
    Worker,
    WorkerLimits,
    WorkerLostError,
    _answer,
    _refusals,
    worker_main,
)
from service.decoding import DecoderPool
from service.errors import DecoderUnavailableError, QueueFullError, VideoRejectedError
from service.sandbox import LAYERS
from service.settings import MIB
from service.streaming import StreamJob

SEEN = Preprocessing(num_frames=4, image_size=32, frame_stride=4)
_of_others: set[int | None] = set()
LIMITS = WorkerLimits(memory_bytes=2048 * MIB, timeout_s=20.0, video=Limits())


def with_pool(
    body: Callable[[DecoderPool], Awaitable[object]],
    limits: WorkerLimits = LIMITS,
    workers: int = 1,
) -> list[str]:
    """Runs `body` with a pool; returns the reasons of the restarts."""
    restarts: list[str] = []
    _of_others.clear()
    _of_others.update(child_pids())

    async def run() -> None:
        pool = DecoderPool(workers, limits, restarts.append)
        await pool.start()
        try:
            await body(pool)
        finally:
            pool.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    return restarts


def child_pids() -> list[int]:
    """The pool's workers; those of a service that other tests keep running do not count."""
    children = multiprocessing.active_children()
    return [
        child.pid for child in children if child.name == "decoder" and child.pid not in _of_others
    ]


def test_clips_from_a_worker_are_those_decoded_here(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        clips = await pool.decode(Job(video, SEEN, views=2, crops=3))
        here = load_clips(video, SEEN, views=2, crops=3)
        assert clips.frames.shape == (6, 4, 32, 32, 3)
        assert np.array_equal(clips.frames, here.frames)
        assert np.array_equal(clips.times, here.times)
        assert clips.facts == here.facts

    assert with_pool(body) == []


def test_a_refused_video_keeps_its_worker(video: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no video at all, only words")

    async def body(pool: DecoderPool) -> None:
        before = child_pids()
        with pytest.raises(VideoRejectedError) as refusal:
            await pool.decode(Job(broken, SEEN, 1, 1))
        assert refusal.value.code in {"unsupported_format", "undecodable_video"}
        await pool.decode(Job(video, SEEN, 1, 1))
        assert child_pids() == before

    assert with_pool(body) == []


def test_a_worker_that_dies_is_replaced_and_only_its_request_fails(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pool: DecoderPool) -> None:
        begin = Worker.begin

        def killed(worker: Worker, *arguments: Any) -> None:
            begin(worker, *arguments)
            assert worker._process is not None
            worker._process.kill()

        with monkeypatch.context() as patch:
            patch.setattr(Worker, "begin", killed)
            with pytest.raises(VideoRejectedError) as refusal:
                await pool.decode(Job(video, SEEN, 60, 3))
        assert refusal.value.code == "decoder_crashed"
        clips = await pool.decode(Job(video, SEEN, 1, 1))
        assert len(clips.frames) == 1

    assert with_pool(body) == ["decoder_crashed"]


def test_a_worker_that_dies_before_it_looks_at_its_video_costs_nobody_anything(
    video: Path,
) -> None:
    async def body(pool: DecoderPool) -> None:
        (pid,) = child_pids()
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # so that it is killed while it has work
        job = asyncio.create_task(pool.decode(Job(video, SEEN, 1, 1)))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        assert len((await job).frames) == 1

    assert with_pool(body) == ["decoder_died"]


def test_decoders_that_die_at_once_again_and_again_are_a_503(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pool: DecoderPool) -> None:
        once = Worker._start_once

        def short_lived(worker: Worker) -> None:
            once(worker)
            assert worker._process is not None
            worker._process.kill()
            worker._connection.poll(20)  # until it is dead, so that what it is sent is lost

        with monkeypatch.context() as patch:
            patch.setattr(Worker, "_start_once", short_lived)
            kill_the_worker()
            with pytest.raises(DecoderUnavailableError):
                await pool.decode(Job(video, SEEN, 1, 1))
        assert len((await pool.decode(Job(video, SEEN, 1, 1))).frames) == 1

    assert set(with_pool(body)) == {"decoder_died"}


def test_a_worker_that_hangs_is_replaced_after_the_time_limit(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        (pid,) = child_pids()
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(VideoRejectedError) as refusal:
            await pool.decode(Job(video, SEEN, 1, 1))
        assert refusal.value.code == "decoding_timeout"
        assert time.monotonic() - started < 15
        assert len((await pool.decode(Job(video, SEEN, 1, 1))).frames) == 1

    assert with_pool(body, LIMITS._replace(timeout_s=1.0)) == ["decoding_timeout"]


def test_two_jobs_run_side_by_side_and_a_third_waits(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        jobs = [pool.decode(Job(video, SEEN, views, 1)) for views in (1, 2, 3)]
        answers = await asyncio.gather(*jobs)
        assert [len(clips.frames) for clips in answers] == [1, 2, 3]

    with_pool(body, workers=2)


def test_it_says_how_many_workers_are_busy_and_how_many_videos_wait(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        assert (pool.busy, pool.waiting) == (0, 0)
        tasks = [asyncio.create_task(pool.decode(Job(video, SEEN, 1, 1))) for _ in range(3)]
        await asyncio.sleep(0)
        assert (pool.busy, pool.waiting) == (1, 2)
        tasks[2].cancel()
        await asyncio.gather(*tasks[:2])
        assert pool.waiting == 0

    with_pool(body)


def test_a_caller_that_leaves_gives_its_worker_back(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        for _ in range(3):
            leaving = asyncio.create_task(pool.decode(Job(video, SEEN, 1, 1)))
            await asyncio.sleep(0)
            leaving.cancel()
        assert len((await pool.decode(Job(video, SEEN, 1, 1))).frames) == 1

    assert with_pool(body) == []


def test_closing_leaves_no_process_behind(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        await pool.decode(Job(video, SEEN, 1, 1))
        assert len(child_pids()) == 2

    with_pool(body, workers=2)
    assert child_pids() == []


def test_a_video_over_the_memory_limit_is_refused_not_fatal(video: Path) -> None:
    class Hungry:
        """Stands in for a decoder that runs out of memory."""

        def __call__(self, *args: object, **options: object) -> None:
            raise MemoryError

    ours, theirs = multiprocessing.Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.decoder.load_clips", Hungry())
        with _refusals(theirs):
            _answer(theirs, Job(video, SEEN, 1, 1), Limits())
    refusal = orjson.loads(ours.recv_bytes())
    assert refusal["code"] == "video_too_large"


def test_the_worker_loop_answers_until_its_parent_is_gone(video: Path) -> None:
    # In a thread-free child of fork: the limits must not fall on the test process.
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=worker_main, args=(theirs, LIMITS, os.getpid()))
    worker.start()
    theirs.close()
    assert set(orjson.loads(ours.recv_bytes())) <= set(LAYERS)
    ours.send_bytes(pickle.dumps(Job(video, SEEN, 1, 1)))
    assert ours.recv_bytes() == _BEGUN
    assert orjson.loads(ours.recv_bytes())["facts"]["frames"] == 60
    assert len(ours.recv_bytes()) == 4 * 32 * 32 * 3
    ours.close()
    worker.join(10)
    assert worker.exitcode == 0


_SERVER = """
import asyncio, multiprocessing, time
from model.video import Limits
from service.decoder import WorkerLimits
from service.decoding import DecoderPool

async def main():
    limits = WorkerLimits(memory_bytes=2 << 30, timeout_s=600.0, video=Limits())
    pool = DecoderPool(2, limits, lambda reason: None)
    await pool.start()
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_busy_workers_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(_SERVER)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            pids = [int(pid) for pid in server.stdout.readline().split()]
            assert len(pids) == 2
            workers = [os.pidfd_open(pid) for pid in pids]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)  # as deaf as one that decodes
        finally:
            server.kill()
    for pid, worker in zip(pids, workers, strict=True):
        ended, _, _ = select.select([worker], [], [], 60)
        os.close(worker)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        assert ended


def test_a_worker_whose_server_was_gone_before_it_began_ends() -> None:
    ours, theirs = multiprocessing.Pipe()
    no_longer = subprocess.Popen(["true"])
    no_longer.wait()
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=worker_main, args=(theirs, LIMITS, no_longer.pid), daemon=True)
    worker.start()
    theirs.close()
    worker.join(60)
    assert worker.exitcode == 1
    with pytest.raises(EOFError):
        ours.recv_bytes()


FACTS = {
    "width": 96,
    "height": 64,
    "rotation": 0,
    "frame_rate": None,
    "frames": 60,
    "duration_s": 2.0,
    "codec": "h264",
    "container": "mp4",
}
SAID = {"times": [[0.0, 0.1, 0.2, 0.3]], "facts": FACTS, "truncated": False, "sampling": "dense"}
PIXELS = bytes(4 * 32 * 32 * 3)
LIES: list[dict[str, object]] = [
    {"times": [[0.0]]},
    {"times": "soon"},
    {"times": [[0.0, 0.1, 0.2, "nan"]]},
    {"sampling": "random"},
    {"facts": ["h264"]},
]
LIES_OF_FACTS: list[dict[str, object]] = [
    {"width": "96"},
    {"height": -1},
    {"rotation": None},
    {"frames": 1.5},
    {"duration_s": "long"},
    {"frame_rate": ""},
    {"codec": 264},
    {"container": "x" * 1000},
    {"password": "x"},
]


def test_what_a_worker_says_is_taken_if_it_can_be(video: Path) -> None:
    worker = Worker(LIMITS)
    worker._connection, theirs = multiprocessing.Pipe()
    theirs.send_bytes(orjson.dumps(SAID))
    theirs.send_bytes(PIXELS)
    assert worker.clips(Job(video, SEEN, 1, 1)).facts == VideoFacts(**FACTS)  # type: ignore[arg-type]


def test_a_worker_that_was_taken_over_does_not_fill_the_memory(video: Path) -> None:
    worker = Worker(LIMITS)
    worker._connection, theirs = multiprocessing.Pipe()

    def swell() -> None:
        with contextlib.suppress(OSError):
            theirs.send_bytes(orjson.dumps(SAID) + b" " * 9_000_000)
            theirs.send_bytes(PIXELS)

    sending = threading.Thread(target=swell)
    sending.start()
    with pytest.raises(WorkerLostError):
        worker.clips(Job(video, SEEN, 1, 1))
    worker._connection.close()
    sending.join(60)


class Swollen(Connection):
    """The end of a pipe whose next message is said to be of a terabyte, and is not to be read."""

    _theirs: Connection

    @classmethod
    def after(cls, *messages: bytes) -> Swollen:
        ours, theirs = multiprocessing.Pipe()
        for message in messages:
            theirs.send_bytes(message)
        theirs._send((-1).to_bytes(4, "big", signed=True) + (2**40).to_bytes(8, "big"))  # type: ignore[attr-defined]
        connection = cls(os.dup(ours.fileno()))
        connection._theirs = theirs
        return connection

    def _recv(self, size: int, *more: Any) -> Any:
        assert size < MIB, "all of the message is read"
        return super()._recv(size, *more)  # type: ignore[misc]


def test_pixels_without_end_are_not_read(video: Path) -> None:
    worker = Worker(LIMITS)
    worker._connection = Swollen.after(orjson.dumps(SAID))
    with pytest.raises(WorkerLostError):
        worker.clips(Job(video, SEEN, 1, 1))


def test_nor_are_those_of_a_long_video(video: Path) -> None:
    window = {"kind": "window", "number": 0, "start_s": 0.0, "end_s": 1.0, "times": [0.0]}
    worker = Worker(LIMITS)
    worker._connection = Swollen.after(orjson.dumps(window))
    with pytest.raises(WorkerLostError):
        worker.next_piece(StreamJob(video, SEEN, Cut(1.0, 1.0, 1, 10), Limits()))


def test_a_worker_that_begins_with_a_message_without_end_is_replaced(video: Path) -> None:
    deaths: list[None] = []
    worker = Worker(LIMITS)
    worker.start()
    worker._connection.close()
    worker._connection = Swollen.after()
    try:
        worker.begin(Job(video, SEEN, 1, 1), lambda: deaths.append(None))
        assert worker.clips(Job(video, SEEN, 1, 1)).facts.frames == 60
    finally:
        worker.stop()
    assert len(deaths) == 1


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize(
    "answers",
    [
        [pickle.dumps(_Harm())],
        [b"{}"],
        [b'{"times": [[0]], "facts": {}, "truncated": false, "sampling": "dense"}', b"short"],
        [b'{"times": [[0]], "facts": {}, "truncated": false, "sampling": "dense"}', b"x" * 99999],
        [b'{"code": "of_its_own_making", "detail": "x"}'],
        [b'{"code": ["empty_file"], "detail": "x"}'],
        [b'{"code": "empty_file", "detail": 7}'],
        *([orjson.dumps({**SAID, **lie}), PIXELS] for lie in LIES),
        *([orjson.dumps({**SAID, "facts": {**FACTS, **lie}}), PIXELS] for lie in LIES_OF_FACTS),
    ],
)
def test_a_worker_that_was_taken_over_gets_no_further(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    worker = Worker(LIMITS._replace(timeout_s=0.2))
    worker._connection, theirs = multiprocessing.Pipe()
    for answer in answers:
        theirs.send_bytes(answer)
    with pytest.raises(WorkerLostError):
        worker.clips(Job(video, SEEN, 1, 1))
    assert not (tmp_path / "harm").exists()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def kill_the_worker() -> None:
    """Ends the pool's one worker and waits until it is dead."""
    (pid,) = child_pids()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_worker_that_died_between_two_videos_costs_nobody_anything(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        await pool.decode(Job(video, SEEN, 1, 1))
        kill_the_worker()
        await pool.decode(Job(video, SEEN, 1, 1))

    assert with_pool(body) == ["decoder_died"]


def test_a_worker_that_is_killed_while_it_starts_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(LIMITS)
    once = worker._start_once
    starts = []

    def killed_at_first() -> None:
        starts.append(1)
        if len(starts) == 1:
            raise EOFError
        once()

    monkeypatch.setattr(worker, "_start_once", killed_at_first)
    worker.start()
    worker.stop()
    assert len(starts) == 2


def test_decoders_that_cannot_be_started_are_a_503_until_they_can(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pool: DecoderPool) -> None:
        def no_memory(worker: Worker) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        with monkeypatch.context() as patch:
            patch.setattr(Worker, "_start_once", no_memory)
            kill_the_worker()
            with pytest.raises(DecoderUnavailableError) as caught:
                await pool.decode(Job(video, SEEN, 1, 1))
            assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "5"})
        await pool.decode(Job(video, SEEN, 1, 1))

    assert with_pool(body) == ["decoder_died"]


@pytest.mark.parametrize("reason", [errno.EAGAIN, errno.EMFILE, errno.ENOMEM])
def test_a_process_that_cannot_be_made_costs_one_request_and_not_its_place_in_the_pool(
    video: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    async def body(pool: DecoderPool) -> None:
        def fails(process: SpawnProcess) -> None:
            raise OSError(reason, os.strerror(reason))

        with monkeypatch.context() as patch:
            patch.setattr(SpawnProcess, "start", fails)
            kill_the_worker()
            before = open_files()
            for _ in range(3):
                with pytest.raises(DecoderUnavailableError):
                    await pool.decode(Job(video, SEEN, 1, 1))
            assert open_files() <= before
        assert len((await pool.decode(Job(video, SEEN, 1, 1))).frames) == 1

    assert with_pool(body) == ["decoder_died"]


def test_a_turn_that_is_not_used_gives_its_worker_back(video: Path) -> None:
    async def body(pool: DecoderPool) -> None:
        with pytest.raises(QueueFullError):
            async with pool.turn():
                raise QueueFullError(1)
        async with pool.turn() as decode:
            assert pool.busy == 1
            assert len((await decode(Job(video, SEEN, 1, 1))).frames) == 1
            assert pool.busy == 0

    assert with_pool(body) == []


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it is of another process
        await asyncio.sleep(0.01)


def test_a_video_that_is_given_up_is_ended_soon_and_its_worker_replaced(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.decoding._PATIENCE_S", 0.2)

    async def body(pool: DecoderPool) -> None:
        (pid,) = child_pids()
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # as one that is at a video for long
        leaving = asyncio.create_task(pool.decode(Job(video, SEEN, 1, 1)))
        await until(lambda: pool._workers[0].decoded == 1)
        leaving.cancel()
        await asyncio.wait({leaving})
        assert leaving.cancelled()
        assert pool.busy == 1
        await until(lambda: pool.busy == 0)
        assert pid not in child_pids()
        assert len((await pool.decode(Job(video, SEEN, 1, 1))).frames) == 1

    assert with_pool(body) == [], "nothing was lost: it was given up"


def test_what_is_given_up_a_moment_before_its_end_costs_no_worker(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.decoding._PATIENCE_S", 60.0)

    async def body(pool: DecoderPool) -> None:
        before = child_pids()
        leaving = asyncio.create_task(pool.decode(Job(video, SEEN, 30, 3)))
        await until(lambda: pool._workers[0].decoded == 1)
        leaving.cancel()
        await until(lambda: pool.busy == 0)
        assert leaving.cancelled()
        assert child_pids() == before

    assert with_pool(body) == []


def test_only_so_many_videos_wait_for_a_decoder(video: Path) -> None:
    async def run() -> None:
        pool = DecoderPool(1, LIMITS, lambda reason: None, max_waiting=2)
        await pool.start()
        try:
            jobs = [asyncio.ensure_future(pool.decode(Job(video, SEEN, 30, 3))) for _ in range(3)]
            await asyncio.sleep(0)
            assert (pool.busy, pool.waiting) == (1, 2)
            with pytest.raises(QueueFullError) as caught:
                await pool.decode(Job(video, SEEN, 1, 1))
            assert int(caught.value.headers["Retry-After"]) >= 1
            with pytest.raises(QueueFullError):
                pool.check_room()
            await asyncio.gather(*jobs)
            pool.check_room()
            await pool.decode(Job(video, SEEN, 1, 1))
        finally:
            pool.close()

    asyncio.run(asyncio.wait_for(run(), 120))
