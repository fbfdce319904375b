"""Messages between processes: whole, in order, of any size, and an end that is noticed."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
import pytest

from service.wire import Wire


async def connected() -> tuple[Wire, Wire]:
    loop = asyncio.get_running_loop()
    ends = []
    for end in socket.socketpair():
        _, wire = await loop.create_unix_connection(Wire, sock=end)
        ends.append(wire)
    return ends[0], ends[1]


def test_messages_arrive_whole_and_in_order_whatever_their_size() -> None:
    large = np.random.default_rng(0).integers(0, 256, (3, 1024, 1024), np.uint8)

    async def run() -> None:
        ours, theirs = await connected()
        ours.send({"number": 1})
        ours.send({"number": 2, "text": "ä" * 100_000}, large, np.ones(3, np.float32))
        ours.send({"number": 3}, np.empty(0, np.uint8))
        first, second, third = [await theirs.receive() for _ in range(3)]
        assert (first.head, bytes(first.body)) == ({"number": 1}, b"")
        assert second.head["text"] == "ä" * 100_000
        assert bytes(second.body) == large.tobytes() + np.ones(3, np.float32).tobytes()
        assert (third.head, bytes(third.body)) == ({"number": 3}, b"")
        theirs.send({"number": 4})
        assert (await ours.receive()).head == {"number": 4}
        ours.abort()

    asyncio.run(run())


def test_what_is_no_contiguous_array_is_sent_as_it_reads() -> None:
    async def run() -> None:
        ours, theirs = await connected()
        turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
        ours.send({}, turned)
        assert bytes((await theirs.receive()).body) == turned.tobytes()
        ours.abort()

    asyncio.run(run())


def test_who_waits_learns_that_the_other_side_is_gone_after_what_it_had_sent() -> None:
    async def run() -> None:
        ours, theirs = await connected()
        told = asyncio.Event()
        theirs.on_lost = told.set
        ours.send({"last": True})
        await ours.close()
        await told.wait()
        assert (await theirs.receive()).head == {"last": True}
        with pytest.raises(ConnectionError):
            await theirs.receive()
        with pytest.raises(ConnectionError):
            theirs.send({})

    asyncio.run(run())
