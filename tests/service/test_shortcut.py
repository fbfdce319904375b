"""Requests that go past the framework, and those that do not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from httpx import ASGITransport

from service.app import create_app, running
from service.errors import BadRequestError
from service.metrics import Metrics
from service.settings import load_settings
from service.shortcut import Shortcut

URL = "/v2/models/demo/infer"
MALFORMED = {"content": b"{}"}
_TENSOR = {"name": "frames", "shape": [1, 8, 64, 64, 3], "datatype": "UINT8", "data": [7] * 98304}
CLIP = orjson.dumps({"inputs": [_TENSOR]})


def ask(scope: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None) -> list[Any]:
    """What is sent for a request to a shortcut for `/models/{model}/run`, before a framework that
    says so.
    """
    router = APIRouter()

    @router.post("/models/{model}/run")
    async def run() -> None:
        """Only described."""

    async def answer(request: Request) -> Response:
        if "broken" in request.headers:
            raise BadRequestError("It is broken.")
        return Response(f"{request.path_params} {request.headers.get('X-Wanted')}")

    async def framework(scope: Any, receive: Any, send: Any) -> None:
        await send("the framework's")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    app = SimpleNamespace(state=SimpleNamespace(metrics=Metrics()))
    asked = {"type": "http", "method": "POST", "path": "/models/a/run", "root_path": "", "app": app}
    whole = {**asked, "headers": headers or [], **scope}
    asyncio.run(Shortcut(framework, routes, answer)(whole, receive, send))
    return sent


def test_a_hot_request_is_answered_without_the_framework() -> None:
    start, body = ask({})
    assert start["status"] == 200
    assert body["body"] == b"{'model': 'a'} None"


@pytest.mark.parametrize(
    "scope",
    [
        {"type": "websocket"},
        {"method": "GET"},
        {"path": "/models/a/run/"},
        {"path": "/models/a/b/run"},
        {"path": "/models/a/run\n"},
        {"root_path": "/behind"},
    ],
)
def test_all_else_is_left_to_it(scope: dict[str, Any]) -> None:
    assert ask(scope) == ["the framework's"]


def test_an_error_is_answered_in_the_form_of_the_path() -> None:
    start, body = ask({}, [(b"broken", b"yes")])
    assert start["status"] == 400
    assert b'"code":"bad_request"' in body["body"]


def test_of_several_headers_of_a_name_the_first_counts() -> None:
    _, body = ask({}, [(b"x-wanted", b"one"), (b"x-other", b"-"), (b"x-wanted", b"two")])
    assert body["body"] == b"{'model': 'a'} one"


@pytest.fixture(scope="module")
def open_client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a service that pages of another origin may call."""
    folder = tmp_path_factory.mktemp("spool")
    with serve(spool_dir=folder, cors_origins="https://a.example") as client:
        yield client


def test_what_goes_around_every_request_goes_around_these(open_client: httpx.Client) -> None:
    sent = {"X-Request-ID": "mine", "Origin": "https://a.example"}
    answer = open_client.post(URL, headers=sent, **MALFORMED)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert answer.headers["X-Request-ID"] == "mine"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"


def test_they_are_counted_by_their_route_and_their_error(open_client: httpx.Client) -> None:
    def counts() -> dict[str, float]:
        lines = open_client.get("/metrics").text.splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    route = 'route="/v2/models/{model}/infer",status="400"'
    counted = f'timesformer_requests_total{{method="POST",{route}}}'
    rejected = 'timesformer_rejected_total{code="invalid_tensor"}'
    open_client.post(URL, **MALFORMED)
    before = counts()
    open_client.post(URL, **MALFORMED)
    after = counts()
    assert after[counted] - before[counted] == 1
    assert after[rejected] - before[rejected] == 1


def test_another_method_is_told_which_one_is_right(open_client: httpx.Client) -> None:
    answer = open_client.get(URL)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_under_a_prefix_the_framework_gives_the_same_answer(tmp_path: Path) -> None:
    settings = load_settings(device="cpu", decode_workers=1, spool_dir=tmp_path)

    async def run() -> list[httpx.Response]:
        app = create_app(settings)
        plain, behind = ASGITransport(app), ASGITransport(app, root_path="/behind")
        async with (
            running(app),
            httpx.AsyncClient(transport=plain, base_url="http://x") as near,
            httpx.AsyncClient(transport=behind, base_url="http://x/behind") as far,
        ):
            url = URL.removeprefix("/")
            return [await client.post(url, content=CLIP) for client in (near, far)]

    near, far = asyncio.run(run())
    assert near.status_code == far.status_code == 200
    assert near.json() == far.json()
