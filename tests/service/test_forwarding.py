"""Requests that another process answers: as if the client had asked it itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from service.forwarding import Forwarder
from service.listening import configuration
from service.settings import load_settings


class Behind(NamedTuple):
    """What the app behind has seen."""

    log: list[Any]
    go_on: asyncio.Event


def app_behind(behind: Behind) -> FastAPI:
    app = FastAPI()

    @app.api_route("/echo", methods=["GET", "HEAD", "POST", "DELETE"])
    async def echo(request: Request) -> Response:
        digest = hashlib.sha256()
        async for chunk in request.stream():
            digest.update(chunk)
        behind.log.append(dict(request.headers))
        headers = {"X-Path": str(request.url).partition("/echo")[2], "X-Method": request.method}
        return Response(digest.hexdigest(), 201, headers=headers)

    @app.get("/slow")
    async def slow() -> Response:
        async def pieces() -> Any:
            yield b"first,"
            await behind.go_on.wait()
            yield b"second"

        return StreamingResponse(pieces())

    @app.get("/endless")
    async def endless() -> Response:
        async def pieces() -> Any:
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0)  # uvicorn's `send` does not wait once the client left
            finally:
                behind.log.append("left")

        return StreamingResponse(pieces())

    @app.post("/refuse")
    async def refuse() -> Response:
        return Response("too large", 413)

    return app


class Both(NamedTuple):
    client: httpx.Client
    behind: Behind
    stopping: list[bool]
    path: Path
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def running(path: Path) -> Iterator[Both]:
    """A server behind a Unix socket and a forwarder before it, in a thread."""
    settings = load_settings(device="cpu", port=0, shutdown_grace_s=1)
    started = threading.Event()
    found: list[Any] = []

    async def run() -> None:
        behind, stopping = Behind([], asyncio.Event()), [False]
        inner = uvicorn.Server(
            configuration(app_behind(behind), settings, "off", uds=str(path), date_header=False)
        )
        front = uvicorn.Server(
            configuration(Forwarder(path, lambda: stopping[0]), settings, lifespan="off")
        )
        tasks = [asyncio.create_task(server.serve()) for server in (inner, front)]
        while not (inner.started and front.started):  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.01)
        port = front.servers[0].sockets[0].getsockname()[1]
        found.extend((inner, front, behind, stopping, port, asyncio.get_running_loop()))
        started.set()
        await asyncio.gather(*tasks)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert started.wait(60)
    inner, front, behind, stopping, port, loop = found
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield Both(client, behind, stopping, path, loop)
    finally:
        inner.should_exit = front.should_exit = True
        thread.join()


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    with running(tmp_path / "http") as both:
        yield both


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_request_comes_through_as_it_is(both: Both, method: str) -> None:
    headers = {"X-Own": "ä".encode(), "Connection": "keep-alive", "TE": "trailers"}
    answer = both.client.request(method, "/echo?a=%20b&c", headers=headers, content=b"body")
    assert answer.status_code == 201
    assert answer.text == hashlib.sha256(b"body").hexdigest()
    assert (answer.headers["x-method"], answer.headers["x-path"]) == (method, "?a=%20b&c")
    assert answer.headers.get_list("date")[1:] == []
    (seen,) = both.behind.log
    assert seen["x-own"] == "ä".encode().decode("latin-1")
    assert seen["host"] == both.client.base_url.netloc.decode()
    assert "te" not in seen


def test_an_upload_in_chunks_is_passed_on_in_chunks(both: Both) -> None:
    pieces = [b"%d" % number * 100_000 for number in range(50)]
    answer = both.client.post("/echo", content=iter(pieces))
    assert answer.text == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert "content-length" not in both.behind.log[0]


def test_a_large_upload_with_its_length(both: Both) -> None:
    body = bytes(30_000_000)
    answer = both.client.post("/echo", content=body)
    assert answer.text == hashlib.sha256(body).hexdigest()
    assert both.behind.log[0]["content-length"] == "30000000"


def test_an_answer_without_a_body_has_its_length(both: Both) -> None:
    answer = both.client.head("/echo")
    assert (answer.status_code, answer.content) == (201, b"")
    assert answer.headers["content-length"] == "64"
    assert both.client.get("/echo").status_code == 201  # the connection goes on


def test_an_answer_is_sent_on_as_it_comes(both: Both) -> None:
    with both.client.stream("GET", "/slow") as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"first,"
        both.loop.call_soon_threadsafe(both.behind.go_on.set)
        assert b"".join(pieces) == b"second"


def test_who_leaves_has_left_there_too(both: Both) -> None:
    with both.client.stream("GET", "/endless") as answer:
        next(answer.iter_raw())
    deadline = time.monotonic() + 60
    while both.behind.log != ["left"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_answer_before_the_end_of_the_upload_arrives(both: Both) -> None:
    url = both.client.base_url
    with socket.create_connection((url.host, url.port), timeout=60) as sender:
        sender.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\nabc")
        answer = sender.recv(65536)
        while b"too large" not in answer:
            more = sender.recv(65536)
            assert more, answer
            answer += more
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_while_the_service_stops_clients_are_asked_to_go_elsewhere(both: Both) -> None:
    assert "connection" not in both.client.get("/echo").headers
    both.stopping[0] = True
    assert both.client.get("/echo").headers["connection"] == "close"


def test_without_the_other_process_it_says_that_it_is_not_ready(both: Both) -> None:
    both.path.unlink()
    for path in ("/health/ready", "/v2/health/ready"):
        answer = both.client.get(path)
        assert answer.status_code == 503
        assert "is gone" in answer.text
