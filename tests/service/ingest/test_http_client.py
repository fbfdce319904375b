"""Requests to URLs of clients: to the checked address alone, and never longer than allowed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpcore2
import pytest

from service.ingest.http_client import HttpClient, Reply
from service.ingest.url_policy import ExchangeFailedError, Policy

pytestmark = pytest.mark.anyio
PATIENCE_S = 60.0
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except OSError:
            pass  # the client has gone
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"


@contextlib.contextmanager
def client_of(host: str, silence_s: float = PATIENCE_S, private: bool = True) -> Any:
    client = HttpClient(Policy((host,), http=True, private=private), silence_s, resolvers=2)
    try:
        yield client
    finally:
        client.close()


async def get(client: HttpClient, url: str) -> tuple[int, bytes]:
    async with client.request("GET", url) as reply:
        return reply.status, b"".join([block async for block in reply.blocks()])


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
    remaining = iter(answers)

    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in next(remaining)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


class RecordingStream(httpcore2.AsyncNetworkStream):
    def __init__(self) -> None:
        self.answer = [b"HTTP/1.1 204 No Content\r\n\r\n"]
        self.server_names: list[str | None] = []
        self.closed = False

    async def read(self, *_: object, **__: object) -> bytes:
        return self.answer.pop() if self.answer else b""

    async def write(self, *_: object, **__: object) -> None:
        pass

    async def aclose(self) -> None:
        self.closed = True

    async def start_tls(
        self,
        ssl_context: object,
        server_hostname: str | None = None,
        timeout: object = None,  # noqa: ASYNC109 - the interface of the library
    ) -> RecordingStream:
        self.server_names.append(server_hostname)
        return self


def record_connections(monkeypatch: pytest.MonkeyPatch, *refusing: str) -> tuple[Any, Any]:
    """Connects to nothing; gives the addresses that were asked for, and the stream."""
    asked: list[tuple[str, int]] = []
    stream = RecordingStream()

    async def connect(
        self: object, address: str, port: int, timeout_s: object
    ) -> httpcore2.AsyncNetworkStream:
        asked.append((address, port))
        if address in refusing:
            raise httpcore2.ConnectError
        return stream

    monkeypatch.setattr(httpcore2.AnyIOBackend, "connect_tcp", connect)
    return asked, stream


def test_request_connects_to_the_very_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that resolves to another address a moment later gains nothing."""
    resolve_to(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    asked, stream = record_connections(monkeypatch)
    with client_of("videos.example.org", private=False) as client:
        assert asyncio.run(get(client, "https://videos.example.org/a")) == (204, b"")
    assert asked == [("8.8.8.8", 443)]
    assert stream.server_names == ["videos.example.org"]
    assert stream.closed


def test_request_tries_each_address_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, ["2606:4700::1111", "8.8.8.8"])
    asked, _ = record_connections(monkeypatch, "2606:4700::1111")
    with client_of("videos.example.org", private=False) as client:
        assert asyncio.run(get(client, "http://videos.example.org/a"))[0] == 204
    assert asked == [("2606:4700::1111", 80), ("8.8.8.8", 80)]


async def test_request_uses_no_proxy_no_credentials_and_no_cookies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    heads: list[bytes] = []
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password s3cret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    async with server(serve) as host:
        with client_of(host) as client:
            for _ in range(2):
                assert await get(client, f"http://{host}/a%20b?c=%2F#d") == (200, b"ok")
    expected = {
        "GET /a%20b?c=%2F HTTP/1.1",
        f"Host: {host}",
        "User-Agent: timesformer-service",
        "Accept-Encoding: identity",
    }
    assert [set(head.decode().strip().split("\r\n")) for head in heads] == [expected] * 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nx", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000, "does not speak HTTP"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "TLS fails"),
        (None, "silent for 0.05 s"),
    ],
)
async def test_request_names_the_host_and_the_reason_of_a_failure(
    answer: bytes | None, reason: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is not None:
            writer.write(answer)
            await writer.drain()
            writer.write_eof()
        await reader.read()

    silence_s = 0.05 if answer is None else PATIENCE_S
    scheme = "https" if reason == "TLS fails" else "http"
    with pytest.raises(ExchangeFailedError, match=r"127\.0\.0\.1") as failure:  # noqa: PT012
        async with server(serve) as host:
            with client_of(host, silence_s) as client:
                await get(client, f"{scheme}://{host}/?s3cret")
    assert reason in str(failure.value)
    assert "s3cret" not in str(failure.value)


def test_request_to_a_closed_port_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        host = f"127.0.0.1:{closed.getsockname()[1]}"
    with client_of(host) as client, pytest.raises(ExchangeFailedError, match="connection fails"):
        asyncio.run(get(client, f"http://{host}/"))


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\n\r\nx"])
async def test_request_that_is_cancelled_ends_the_connection_at_once(
    scheme: str, begin: bytes
) -> None:
    """While the host is silent: in the TLS handshake, before its reply, or in the middle of it."""
    if scheme == "https":
        begin = b""

    connected, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(begin)
        connected.set()
        try:
            await reader.read()
        finally:
            ended.set()

    async with server(serve) as host:
        with client_of(host) as client:
            reading = asyncio.create_task(get(client, f"{scheme}://{host}/"))
            async with asyncio.timeout(PATIENCE_S):
                await connected.wait()
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                await ended.wait()


async def test_request_whose_name_server_does_not_answer_ends_and_blocks_no_other_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()
    real = socket.getaddrinfo

    def resolve(host: Any, *more: Any, **options: Any) -> Any:
        if host == "hangs.example.org":
            over.wait(PATIENCE_S)
            raise socket.gaierror
        return real(host, *more, **options)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        async with server(serve) as host:
            with client_of("hangs.example.org", 0.05) as hanging, client_of(host) as other:
                for _ in range(4):  # more than there are threads
                    with pytest.raises(ExchangeFailedError, match="silent"):
                        await get(hanging, "http://hangs.example.org/")
                assert await get(other, f"http://{host}/") == (204, b"")
    finally:
        over.set()


async def test_blocks_lets_other_tasks_run_between_tiny_chunks() -> None:
    class Flood:
        status, headers = 200, [(b"Content-Type", b"video/mp4")]

        async def aiter_stream(self) -> AsyncIterator[bytes]:
            for _ in range(640):
                yield b"x"  # without a wait in between

    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(tick())
    async for _ in Reply("host", Flood()).blocks():  # type: ignore[arg-type]
        pass
    other.cancel()
    assert turns >= 9
