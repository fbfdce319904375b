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
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.server import http_protocol as protocol
from tests.service.conftest import Serve
from tests.service.inference.stepped import virtual

HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def impatient(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    monkeypatch.setattr("service.server.http_protocol._LINGER_S", 0.3)
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


def test_a_connection_that_is_never_used_is_closed_without_a_word(impatient: httpx.Client) -> None:
    with connected(impatient) as connection:
        assert read_until_closed(connection) == b""


def test_a_head_that_does_not_come_to_its_end_is_cut_off_the_first_and_the_second(
    impatient: httpx.Client,
) -> None:
    first = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    for before, statuses in ((b"", [b"408"]), (first, [b"200", b"408"])):
        with connected(impatient) as connection:
            connection.sendall(before + HEAD)
            answers = read_until_closed(connection)
        assert [part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]] == statuses


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


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.mark.parametrize("field", [b"a:b\r\n" * 800, b"x" * 4000])
def test_what_follows_a_chunked_body_without_end_is_refused_while_it_is_read(
    impatient: httpx.Client, field: bytes
) -> None:
    with connected(impatient) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(CHUNKED + b"0\r\nX-First: ")
            for _ in range(400):
                connection.sendall(field)
        assert b" 431 " in read_until_closed(connection)[:40]


@pytest.mark.parametrize("rest", [b"\r\n", b"\r\n\r\n\r\n"])
def test_empty_lines_after_an_answer_keep_no_connection(
    impatient: httpx.Client, rest: bytes
) -> None:
    with connected(impatient) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(rest)
        read_until_closed(connection)


def test_nor_does_the_end_of_a_body_that_nobody_wanted(impatient: httpx.Client) -> None:
    with connected(impatient) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")
        connection.sendall(b"abc")
        assert b"HTTP/1.1" not in read_until_closed(connection)


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
        connection.sendall(2 * (HEAD + body) + HEAD + b"Connection: close\r\n" + body)
        assert read_until_closed(connection).count(b"HTTP/1.1 4") == 3


class Wire(asyncio.Transport):
    """A connection that nobody is at the other end of."""

    reading = True

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to close."""


@virtual
async def test_fields_after_a_body_are_not_kept() -> None:
    seen = asyncio.get_running_loop().create_future()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        seen.set_result(scope["headers"])

    connection = connection_to(app)
    connection.data_received(CHUNKED + b"0\r\n" + b"a:b\r\n" * 9000 + b"\r\n")
    assert await seen == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize(
    "reads",
    [
        [b"fa0\r\n", *[b"x" * 4000 + b"\r\nfa0\r\n"] * 39, b"x" * 4000 + b"\r\n0\r\n\r\n"],
        [*[b"fa0\r\n", b"x" * 2000, b"x" * 2000, b"\r\n"] * 40, b"0\r\nX-Digest: 1\r\n\r\n"],
    ],
    ids=["behind their headers", "anywhere"],
)
@virtual
async def test_chunks_in_reads_that_end_anywhere_are_no_such_fields(reads: list[bytes]) -> None:
    """Nor are the few that a client may send behind the chunks."""
    seen = asyncio.get_running_loop().create_future()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        seen.set_result(size)

    connection = connection_to(app)
    connection.data_received(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    for data in reads:
        connection.data_received(data)
        await asyncio.sleep(0)
    assert await seen == 160_000
    assert isinstance(connection.transport, Wire)
    assert b" 431 " not in connection.transport.written


@virtual
async def test_a_body_is_not_counted_with_the_head_that_follows_it() -> None:
    answered = asyncio.Semaphore(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        answered.release()

    connection = connection_to(app)
    whole = HEAD + b"Content-Length: 100000\r\n\r\n" + b"x" * 100_000
    connection.data_received(whole + whole[:20])
    connection.data_received(whole[20:])
    for _ in range(2):
        await answered.acquire()
    assert isinstance(connection.transport, Wire)
    assert b" 431 " not in connection.transport.written


def connection_to(app: Any) -> protocol.DeadlineProtocol:
    kind = protocol.with_head_timeout(10)
    config = Config(app, http=kind, lifespan="off", log_config=None)
    config.load()
    connection = kind(config=config, server_state=ServerState(), app_state={})
    connection.connection_made(Wire())
    return connection


@virtual
async def test_uvicorn_has_the_attributes_that_are_needed_of_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Answers nothing."""

    plain = HttpToolsProtocol(
        config=Config(app, lifespan="off", log_config=None),
        server_state=ServerState(),
        app_state={},
    )
    plain.connection_made(Wire())
    plain.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    ours = vars(protocol.DeadlineProtocol)
    # A callback that httptools calls and uvicorn leaves alone, and names of our own.
    own = {name for name in ours if name[0] == "_"} | {"head_timeout_s", "on_chunk_header"}
    needed = {"transport", "loop", "cycle", "timeout_keep_alive_task"} | ours.keys() - own
    assert needed <= set(dir(plain))
    assert not own & {name for name in dir(plain) if name[:2] != "__"}
    assert {"response_started", "response_complete"} <= vars(plain.cycle).keys()


@virtual
async def test_reading_pauses_while_the_app_does_not_take_a_large_body() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Reads nothing."""

    connection = connection_to(app)
    connection.data_received(HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 200_000)
    assert isinstance(connection.transport, Wire)
    assert not connection.transport.reading
