"""A worker asks for the network: what it gets is what it would get beside the engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle import BundleStore
from model.demo import STORE
from service.auth import ApiKey, Keyring, write_keys
from service.errors import (
    InternalError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
    ServiceError,
    TooManyRequestsError,
    VideoRejectedError,
)
from service.lingering import leave_running, outlasting
from service.logging import request_id
from service.network import Answered, GaveWayError, Wanted
from service.remote import Link, RemoteNetwork, SharedKeyring
from service.sessions import Sessions
from service.turns import Answer
from service.wire import Wire

BUNDLE = BundleStore(STORE).open("demo")
CONFIG = BUNDLE.config
SHAPE = (CONFIG.num_frames, CONFIG.image_size, CONFIG.image_size, 3)


def clips(count: int) -> Any:
    return np.random.default_rng(count).integers(0, 256, (count, *SHAPE), np.uint8)


def logits_of(frames: Any) -> Any:
    return frames.reshape(len(frames), -1)[:, :5].astype(np.float32)


class Engines:
    """A network whose answers can be told from its clips, and which notes who is there."""

    bundle = BUNDLE

    def __init__(self) -> None:
        self.held = 0
        self.log: list[Any] = []
        self.hang = False
        self.canary = False

    async def check_room(self, model: str | None, count: int, priority: str) -> None:
        self.log.append((model, count, priority, request_id.get()))
        if count > 10:
            raise QueueFullError(7)

    async def find(self, wanted: Wanted, priority: str) -> Any:
        if priority == "low":
            raise QueueFullError(7)
        if wanted.model != "demo":
            raise ModelNotFoundError("There is no such model here.")
        return BUNDLE

    def for_video(self, wanted: Wanted, count: int, priority: str) -> Any:
        self.canary = wanted.canary and wanted.key == "canary"
        return self.for_clips(wanted)

    @contextlib.asynccontextmanager
    async def for_clips(self, wanted: Wanted) -> AsyncIterator[Any]:
        await self.find(wanted, "normal")
        self.held += 1
        try:
            yield self
        finally:
            self.held -= 1

    async def answer(self, frames: Any, priority: str, deadline: float | None) -> Answered:
        self.log.append((priority, deadline))
        if self.canary:
            raise GaveWayError
        if self.hang:
            try:
                await asyncio.Event().wait()
            finally:
                self.log.append("dropped")
        return Answered("1", Answer(logits_of(frames), -logits_of(frames), 0.25, 0.5))


Case = Callable[[Engines, Link, RemoteNetwork], Awaitable[None]]


def run(tmp_path: Path, case: Case, keyring: Keyring | None = None) -> Engines:
    engines = Engines()

    async def all_of_it() -> None:
        sessions = Sessions(engines, keyring)  # type: ignore[arg-type]
        await sessions.open(tmp_path / "ask")
        link = Link(tmp_path / "ask")
        await case(engines, link, RemoteNetwork(link))
        link.close()
        await sessions.close()

    asyncio.run(all_of_it())
    assert engines.held == 0
    return engines


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it is of another side
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("count", [1, 7])
def test_clips_go_there_and_their_answer_comes_back(tmp_path: Path, count: int) -> None:
    frames = clips(count)

    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        for holding in (
            network.for_video(Wanted("demo"), count, "normal"),
            network.for_clips(Wanted("demo")),
        ):
            async with holding as held:
                assert held.bundle.manifest == BUNDLE.manifest
                assert engines.held == 1
                version, answer = await held.answer(frames, "high", 12.5)
            assert version == "1"
            np.testing.assert_array_equal(answer.logits, logits_of(frames))
            np.testing.assert_array_equal(answer.embedding, -logits_of(frames))
            assert answer.logits.dtype == np.float32
            assert (answer.queue_s, answer.inference_s) == (0.25, 0.5)

    assert run(tmp_path, case).log == [("high", 12.5)] * 2


def test_errors_are_those_of_the_other_side(tmp_path: Path) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        request_id.set("r1")
        with pytest.raises(ServiceError) as full:
            await network.check_room("demo", 11, "low")
        assert (full.value.status, full.value.code) == (503, "queue_full")
        assert full.value.headers == {"Retry-After": "7"}
        assert engines.log == [("demo", 11, "low", "r1")]
        with pytest.raises(ServiceError) as full:
            await network.find(Wanted("demo"), "low")
        assert full.value.code == "queue_full"
        for wrong in (
            network.find(Wanted("other"), "high"),
            enter(network.for_clips(Wanted("other"))),
        ):
            with pytest.raises(ServiceError) as unknown:
                await wrong
            assert unknown.value.code == "model_not_found"
        await network.check_room("demo", 1, "low")  # the connection is as good as before

    run(tmp_path, case)


async def enter(holding: Any) -> None:
    async with holding:
        pass


def test_a_defect_there_is_a_500_here_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        async with network.for_clips(Wanted("demo")) as held:
            with pytest.raises(ServiceError) as broken:
                await held.answer(clips(1)[:, :, :1], "normal", None)
        assert broken.value.code == InternalError.code
        assert await network.find(Wanted("demo"), "high")

    run(tmp_path, case)
    assert "a worker's request broke" in caplog.text


def test_a_candidate_that_gives_way_is_told_and_the_request_can_be_asked_again(
    tmp_path: Path,
) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        wanted = Wanted("demo", key="canary")
        with pytest.raises(GaveWayError):
            async with network.for_video(wanted, 1, "normal") as held:
                await held.answer(clips(1), "normal", None)
        async with network.for_video(wanted._replace(canary=False), 1, "normal") as held:
            assert (await held.answer(clips(1), "normal", None)).version == "1"

    run(tmp_path, case)


def test_a_request_that_ends_early_lets_go_of_what_was_held_for_it(tmp_path: Path) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        with pytest.raises(VideoRejectedError):
            async with network.for_video(Wanted("demo"), 1, "normal"):
                raise VideoRejectedError("empty_file", "The video cannot be decoded.")
        await until(lambda: engines.held == 0)
        assert await network.find(Wanted("demo"), "high")

    run(tmp_path, case)


def test_a_request_that_is_cancelled_is_dropped_there(tmp_path: Path) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        engines.hang = True

        async def ask() -> None:
            async with network.for_clips(Wanted("demo")) as held:
                await held.answer(clips(1), "normal", None)

        task = asyncio.create_task(ask())
        await until(lambda: len(engines.log) == 1)
        task.cancel()
        await until(lambda: "dropped" in engines.log)
        assert engines.held == 0

    run(tmp_path, case)


def test_nothing_of_a_worker_that_is_killed_stays(tmp_path: Path) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_unix_connection(Wire, str(tmp_path / "ask"))
        ask = {"ask": "for_clips", "wanted": tuple(Wanted("demo")), "request_id": None, "trace": ()}
        wire.send(ask)
        await wire.receive()
        assert engines.held == 1
        wire.abort()
        await until(lambda: engines.held == 0)

    run(tmp_path, case)


def test_without_the_other_process_nothing_is_ready(tmp_path: Path) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        with pytest.raises(NotReadyError):
            await RemoteNetwork(Link(tmp_path / "nobody")).find(Wanted("demo"), "high")

    run(tmp_path, case)


def test_many_requests_at_once_get_their_own_answers(tmp_path: Path) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        async def ask(count: int) -> None:
            frames = clips(count)
            async with network.for_clips(Wanted("demo")) as held:
                answer = (await held.answer(frames, "normal", None)).answer
            np.testing.assert_array_equal(answer.logits, logits_of(frames))

        await asyncio.gather(*(ask(1 + number % 5) for number in range(100)))

    run(tmp_path, case)


# ---- keys ----------------------------------------------------------------------------------------


def key(**limits: int) -> ApiKey:
    return ApiKey(name="ann", sha256="0" * 64, scopes=("infer",), **limits)  # type: ignore[arg-type]


def keyrings(path: Path, limited: ApiKey) -> Keyring:
    write_keys(path, (limited,))
    return Keyring(path)


def test_the_rate_of_a_key_holds_over_all_workers(tmp_path: Path) -> None:
    limited = key(requests_per_minute=3)

    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        workers = [SharedKeyring(tmp_path / "keys", link) for _ in range(2)]
        for number in range(3):
            async with workers[number % 2].counting(limited):
                pass
        for worker in workers:
            with pytest.raises(ServiceError) as refused:
                async with worker.counting(limited):
                    pass
            assert refused.value.code == TooManyRequestsError("", 1).code
            assert int(refused.value.headers["Retry-After"]) > 0

    run(tmp_path, case, keyrings(tmp_path / "keys", limited))


def test_so_does_what_it_may_run_at_once(tmp_path: Path) -> None:
    limited = key(max_concurrent=1)
    keyring = keyrings(tmp_path / "keys", limited)

    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        one, other = (SharedKeyring(tmp_path / "keys", link) for _ in range(2))
        async with one.counting(limited):
            with pytest.raises(ServiceError) as refused:
                async with other.counting(limited):
                    pass
            assert refused.value.status == 429
        await until(lambda: keyring._usage["ann"].running == 0)
        async with other.counting(limited):
            pass

    run(tmp_path, case, keyring)


def test_what_a_request_leaves_running_counts_until_it_is_over(tmp_path: Path) -> None:
    limited = key(max_concurrent=1)
    keyring = keyrings(tmp_path / "keys", limited)

    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        one, other = (SharedKeyring(tmp_path / "keys", link) for _ in range(2))
        over = asyncio.Event()

        async def ask() -> None:
            async with outlasting(one.counting(limited)):
                leave_running(over)
                raise VideoRejectedError("decoding_timeout", "It was given up.")

        with pytest.raises(VideoRejectedError):
            await asyncio.create_task(ask())
        with pytest.raises(ServiceError) as refused:
            async with other.counting(limited):
                pass
        assert refused.value.status == 429
        over.set()
        await until(lambda: keyring._usage["ann"].running == 0)
        async with outlasting(other.counting(limited)):
            pass
        await until(lambda: keyring._usage["ann"].running == 0)

    run(tmp_path, case, keyring)


def test_a_key_without_limits_costs_no_question(tmp_path: Path) -> None:
    async def case(engines: Engines, link: Link, network: RemoteNetwork) -> None:
        async with SharedKeyring(tmp_path / "keys", Link(tmp_path / "nobody")).counting(key()):
            pass

    run(tmp_path, case, keyrings(tmp_path / "keys", key()))
