"""What every request has in common: ids, errors, health, metrics, the API's description."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.routing import iter_route_contexts
from numpy.typing import NDArray

from export.bundle.bundle import BundleStore
from export.runtime.interface import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from model.demo import STORE
from service.server.app import create_admin_app, create_app
from service.settings import SettingsError, load_settings
from tests.service.conftest import Serve
from tests.service.registry.test_models import wait_until


def test_it_is_alive_and_ready_and_says_what_runs_it(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"live": True}
    assert client.get("/health/ready").json() == {
        "ready": True,
        "model": {"name": "demo", "version": "1"},
        "engine": "onnxruntime",
        "provider": "CPUExecutionProvider",
        "device": "cpu",
        "precision": "float32",
        "tensorrt": "off: the CPU is to be used",
        "engines": [{"device": "cpu", "healthy": True}],
        "models": [{"name": "demo", "version": "1", "refused": False}],
    }


def test_the_models_are_listed_with_what_they_are(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    manifest = BundleStore(STORE).open("demo").manifest
    assert model["labels"] == list(manifest.labels)
    assert model["preprocessing"]["num_frames"] == 8
    assert model["architecture"]["attention_type"] == "divided_space_time"
    assert model["device"] == "cpu"
    assert 0 < model["parameters"] < 2_000_000
    assert model["temperature"] == manifest.temperature


def test_a_request_keeps_the_id_that_its_client_gave(client: httpx.Client) -> None:
    given = client.get("/health/live", headers={"X-Request-ID": "order-66.a_b"})
    assert given.headers["x-request-id"] == "order-66.a_b"


@pytest.mark.parametrize("identifier", ["", "a b", "x" * 200, "é".encode(), b"a\tb"])
def test_an_id_that_could_harm_a_log_is_replaced(
    client: httpx.Client, identifier: str | bytes
) -> None:
    answer = client.get("/health/live", headers={"X-Request-ID": identifier})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/classify", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_the_frameworks_own_errors_are_problems_too(
    client: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == code


def test_metrics_count_requests_by_route_template_only(client: httpx.Client) -> None:
    client.get("/nowhere/secret-42")
    client.request("BREW", "/nowhere")
    text = client.get("/metrics").text
    assert 'timesformer_requests_total{method="GET",route="unmatched",status="404"}' in text
    assert "secret-42" not in text
    assert "BREW" not in text


def test_metrics_say_which_bundle_runs_on_what(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    assert (
        'timesformer_model_info{device="cpu",engine="onnxruntime",model="demo",'
        'precision="float32",provider="CPUExecutionProvider",version="1"} 1.0' in text
    )
    assert "timesformer_ready 1.0" in text


def test_a_defect_of_ours_is_a_500_problem_with_its_id_and_a_log(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("service.api.routes.models.cost", broken)
    answer = client.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert "secret detail" in caplog.text


def test_the_description_of_the_api_is_whole(client: httpx.Client) -> None:
    description = client.get("/openapi.json").json()
    classify = description["paths"]["/v1/classify"]["post"]
    assert set(classify["requestBody"]["content"]) >= {
        "multipart/form-data",
        "application/octet-stream",
    }
    assert {"400", "408", "413", "415", "422", "503", "504"} <= set(classify["responses"])
    problem = classify["responses"]["422"]["content"]
    assert list(problem) == ["application/problem+json"]
    assert {parameter["name"] for parameter in classify["parameters"]} == {
        "top_k",
        "views",
        "crops",
        "threshold",
        "model",
        "X-Request-Priority",
        "X-Request-Timeout",
    }
    assert description["components"]["schemas"]["ClassifyResponse"]["examples"]


def test_no_endpoint_has_the_framework_read_its_body() -> None:
    """It would do so before it asks for the key, and without any limit."""
    public = create_app(load_settings())
    apps = (public, create_admin_app(public))
    routes = [route for app in apps for route in iter_route_contexts(app.routes)]
    assert len(routes) > 20
    assert [route.path for route in routes if getattr(route, "body_field", None)] == []


def test_before_it_is_ready_work_is_refused_and_it_is_alive_all_the_same() -> None:
    transport = httpx.ASGITransport(create_app(load_settings()))  # starts nothing

    async def ask(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    assert asyncio.run(ask("/health/live")).status_code == 200
    assert "timesformer_ready 0.0" in asyncio.run(ask("/metrics")).text
    for path in ("/health/ready", "/v1/models"):
        answer = asyncio.run(ask(path))
        assert answer.status_code == 503
        assert answer.json()["code"] == "not_ready"


def test_an_engine_that_fails_for_a_while_is_ready_again_though_nobody_asks_it(
    serve: Serve, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down, honest = threading.Event(), OnnxRuntime.run

    def run(runtime: OnnxRuntime, frames: NDArray[np.uint8]) -> Outputs:
        if down.is_set():
            raise MemoryError("CUDA out of memory")
        return honest(runtime, frames)

    monkeypatch.setattr(OnnxRuntime, "run", run)
    monkeypatch.setattr("service.inference.batcher.TRY_EVERY_S", 0.05)
    with serve(spool_dir=tmp_path) as client:

        def ready() -> tuple[int, bool]:
            told = "timesformer_ready 1.0" in client.get("/metrics").text
            return client.get("/health/ready").status_code, told

        assert ready() == (200, True)
        down.set()
        for _ in range(3):
            answer = client.post("/v1/classify", content=video.read_bytes())
            assert answer.status_code == 500
        assert ready() == (503, False)
        down.clear()
        wait_until(lambda: ready() == (200, True))


def test_the_page_runs_its_own_script_and_nothing_from_elsewhere(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert f"script-src '{inline_digest(answer.text)}'" in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"(src|href)=\"?(https?:)?//", answer.text)


def test_the_page_has_what_its_script_asks_for(client: httpx.Client) -> None:
    page = client.get("/").text
    used = set(re.findall(r'byId\("(\w+)"\)', page))
    assert used
    assert used <= set(re.findall(r'\bid="(\w+)"', page))
    documented = client.get("/openapi.json").json()["paths"]
    endpoints = set(re.findall(r'"(v1/\w+)"', page))
    assert endpoints == {"v1/models", "v1/classify", "v1/timeline"}
    assert {f"/{endpoint}" for endpoint in endpoints} <= set(documented)


def test_the_docs_run_swagger_ui_of_ours_and_nothing_from_elsewhere(client: httpx.Client) -> None:
    answer = client.get("/docs")
    assert (
        f"script-src 'self' '{inline_digest(answer.text)}'"
        in (answer.headers["content-security-policy"])
    )
    assert not re.search(r"(src|href)=\"?(https?:)?//", answer.text)
    assets = re.findall(r'(?:src|href)="(/docs/[^"]+)"', answer.text)
    assert len(assets) == 2
    for asset in assets:
        found = client.get(asset)
        assert found.status_code == 200
        assert len(found.content) > 100_000
        assert found.headers["content-type"].startswith(("text/javascript", "text/css"))
    assert client.get("/docs/other.js").status_code == 422


def inline_digest(page: str) -> str:
    script = re.search("<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    return f"sha256-{base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()}"


def test_pages_can_be_turned_off(serve: Serve, tmp_path: Path) -> None:
    with serve(pages="off", spool_dir=tmp_path) as client:
        paths = ("/", "/docs", "/docs/swagger-ui.css", "/openapi.json", "/redoc")
        assert {client.get(path).status_code for path in paths} == {404}
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("path", ["/health/live", "/v1/models", "/nowhere", "/metrics", "/v2"])
def test_an_answer_is_not_to_be_guessed_at_framed_or_kept(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert "server" not in headers


def test_no_page_of_elsewhere_may_call_it_unless_its_origin_is_named(
    client: httpx.Client, serve: Serve, tmp_path: Path
) -> None:
    ours, theirs = "https://app.example.com", "https://evil.example.com"
    assert (
        "access-control-allow-origin"
        not in client.get("/v1/models", headers={"Origin": ours}).headers
    )
    with serve(cors_origins=f"https://x.example.com, {ours}", spool_dir=tmp_path) as open_client:
        allowed = open_client.get("/v1/models", headers={"Origin": ours})
        assert allowed.headers["access-control-allow-origin"] == ours
        assert "access-control-allow-credentials" not in allowed.headers
        other = open_client.get("/v1/models", headers={"Origin": theirs})
        assert "access-control-allow-origin" not in other.headers
        preflight = open_client.options(
            "/v1/classify",
            headers={
                "Origin": ours,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "x-api-key",
            },
        )
        assert preflight.status_code == 200
        assert "x-api-key" in preflight.headers["access-control-allow-headers"].lower()


@pytest.mark.parametrize("origins", ["example.com", "https://example.com/", "https://a b", "*,,"])
def test_what_is_no_origin_is_refused_at_start(origins: str) -> None:
    with pytest.raises(SettingsError, match="TIMESFORMER_CORS_ORIGINS"):
        load_settings(cors_origins=origins)


def test_a_path_of_several_routes_names_the_methods_of_all(client: httpx.Client) -> None:
    answer = client.patch("/v1/admin/models/demo/candidate")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, PUT"
