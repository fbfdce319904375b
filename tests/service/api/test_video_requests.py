"""How long a request's work may go on: until it is done, its time is up, or its client has gone."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.api.video_requests import answer_in_time
from service.errors import ClientDisconnectedError, RequestTimeoutError

LONG_S, NO_TIME_S = 60.0, 0.001


class Work:
    """Something that takes until it is told to end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.given_up = False

    async def run(self) -> str:
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.given_up = True
            raise
        return "done"


class Client:
    """The part of a request that says when the client goes."""

    def __init__(self) -> None:
        self.goes = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.goes.wait()
        return {"type": "http.disconnect"}


def leaves_nothing(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Runs a test, which is a coroutine function; it must leave no task and no unheard error."""

    async def whole() -> None:
        unheard: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unheard.append(what))
        await test()
        await asyncio.sleep(0)
        assert not unheard
        assert asyncio.all_tasks() == {asyncio.current_task()}, "something still waits"

    @functools.wraps(test)
    def in_its_own_loop() -> None:
        asyncio.run(whole())

    return in_its_own_loop


@leaves_nothing
async def test_work_that_ends_is_answered_and_nothing_goes_on_waiting() -> None:
    client, work = Client(), Work()
    answer = asyncio.ensure_future(answer_in_time(client, LONG_S, work.run()))
    await asyncio.sleep(0)
    work.may_end.set()
    assert await answer == "done"
    client.goes.set()  # too late to matter


@leaves_nothing
async def test_work_is_given_up_when_the_client_goes() -> None:
    client, work = Client(), Work()
    answer = asyncio.ensure_future(answer_in_time(client, LONG_S, work.run()))
    await asyncio.sleep(0)
    client.goes.set()
    with pytest.raises(ClientDisconnectedError):
        await answer
    assert work.given_up


@leaves_nothing
async def test_work_is_given_up_when_its_time_is_up() -> None:
    work = Work()
    with pytest.raises(RequestTimeoutError):
        await answer_in_time(Client(), NO_TIME_S, work.run())
    assert work.given_up


@leaves_nothing
async def test_whoever_gives_up_the_request_gives_up_its_work() -> None:
    work = Work()
    answer = asyncio.ensure_future(answer_in_time(Client(), LONG_S, work.run()))
    await asyncio.sleep(0)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert work.given_up


@leaves_nothing
async def test_a_timeout_within_the_work_is_an_error_of_its_own() -> None:
    async def fails() -> None:
        raise TimeoutError("a disk")

    with pytest.raises(TimeoutError, match="a disk"):
        await answer_in_time(Client(), LONG_S, fails())
