"""Connections that send slowly, without end or on and on, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from service import protocol
from tests.service.conftest import Serve

HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def impatient(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    monkeypatch.setattr("service.protocol._LINGER_S", 0.3)
    with serve(head_timeout_s=0.5, upload_timeout_s=30, spool_dir=tmp_path) as client:
        yield client


@contextlib.contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port), 30) as connection:
        yield connection


def read_until_closed(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(65536):
            received += block
    return received


def test_a_head_that_does_not_come_to_its_end_is_cut_off(impatient: httpx.Client) -> None:
    with connected(impatient) as connection:
        connection.sendall(HEAD)
        assert read_until_closed(connection).startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_is_never_used_is_closed_without_a_word(impatient: httpx.Client) -> None:
    with connected(impatient) as connection:
        assert read_until_closed(connection) == b""


def test_the_second_request_of_a_connection_has_a_deadline_too(impatient: httpx.Client) -> None:
    with connected(impatient) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD)
        answers = read_until_closed(connection)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in answers


@pytest.mark.parametrize("header", [b"X-Long: ", b""])
def test_a_head_without_end_is_refused_while_it_is_read(
    impatient: httpx.Client, header: bytes
) -> None:
    line = b"" if header else b"X-Many: x\r\n"
    with connected(impatient) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(HEAD + header)
            for _ in range(40):
                connection.sendall(line * 400 or b"x" * 4000)
        assert b" 431 " in read_until_closed(connection)[:40]


def test_a_large_head_below_the_limit_is_read(impatient: httpx.Client) -> None:
    answer = impatient.get("/health/live", headers={"X-Long": "x" * 60_000})
    assert answer.status_code == 200
    assert protocol.MAX_HEAD_BYTES > 60_000


def test_a_refused_client_that_sends_on_is_left_after_a_moment(impatient: httpx.Client) -> None:
    with connected(impatient) as connection:
        connection.sendall(HEAD + b"Content-Length: 900000000\r\n\r\n")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 60:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - began < 60
        assert b" 413 " in connection.recv(65536)[:20]


def test_a_slow_body_is_not_the_heads_concern(impatient: httpx.Client) -> None:
    def slowly() -> Iterator[bytes]:
        for _ in range(4):
            yield b"x"
            time.sleep(0.3)

    assert impatient.post("/v1/classify", content=slowly()).status_code in {415, 422}


def test_pipelined_requests_are_all_answered(impatient: httpx.Client) -> None:
    with connected(impatient) as connection:
        body = b"Content-Length: 5\r\n\r\nwords"
        connection.sendall(3 * (HEAD + body))
        assert read_until_closed(connection).count(b"HTTP/1.1 4") == 3


class Wire(asyncio.Transport):
    """A connection that nobody is at the other end of."""

    reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write(self, data: Any) -> None:
        """Answers go nowhere."""

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to close."""


def test_a_body_in_one_piece_is_taken_as_it_is_and_more_waits_for_the_app() -> None:
    async def run() -> None:
        pieces: asyncio.Queue[bytes] = asyncio.Queue()
        wanted = asyncio.Semaphore(0)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            for _ in range(2):
                await wanted.acquire()
                pieces.put_nowait((await receive())["body"])

        kind = protocol.with_head_timeout(10)
        config = Config(app, http=kind, lifespan="off", log_config=None)
        config.load()
        connection = kind(config=config, server_state=ServerState(), app_state={})
        wire = Wire()
        connection.connection_made(wire)
        blocks = [bytes([number]) * 100_000 for number in range(3)]
        connection.data_received(HEAD + b"Content-Length: 1000000\r\n\r\n" + blocks[0])
        assert wire.reading
        connection.data_received(blocks[1])
        assert not wire.reading
        wanted.release()
        assert await pieces.get() == blocks[0] + blocks[1]
        assert wire.reading
        connection.data_received(blocks[2])
        wanted.release()
        assert await pieces.get() == blocks[2]

    asyncio.run(run())
