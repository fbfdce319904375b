"""Priorities, deadlines and clients that leave, over real sockets: what is dropped costs nothing.

The engine and the decoder are real, and held where a test says so.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from export.runtime.interface import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from model.demo import SAMPLE_CLIP
from service.api.auth import ApiKey, new_key, write_keys
from tests.service.conftest import Serve, send
from tests.service.conftest import tensor as tensor_of
from tests.service.registry.test_models import wait_until

INFER = "/v2/models/demo/infer"
SHAPE = (8, 64, 64, 3)


class Held:
    """Stands before a function that the service calls in threads: counts, and can hold it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.calls: list[tuple[Any, ...]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        assert self.gate.wait(60)
        return self._function(*arguments)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(OnnxRuntime.run)

    def run(runtime: OnnxRuntime, frames: np.ndarray) -> Outputs:
        return held(runtime, frames)

    monkeypatch.setattr(OnnxRuntime, "run", run)
    yield held
    held.gate.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def tensor(value: int = 0, clips: int = 1, **parameters: int) -> dict[str, Any]:
    """An inference request with clips of one colour, as keywords of httpx."""
    return tensor_of(np.full((clips, *SHAPE), value, np.uint8), **parameters)


def value(client: httpx.Client, metric: str) -> float:
    """The sum of a metric over all its labels that the text names."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(metric))


def occupy(client: httpx.Client, pool: ThreadPoolExecutor, engine: Held) -> Future[httpx.Response]:
    """Holds the engine with a batch, so that what follows has to queue."""
    engine.gate.clear()
    before = len(engine.calls)
    first = pool.submit(client.post, INFER, **tensor(255))
    wait_until(lambda: len(engine.calls) > before)
    return first


def post(client: httpx.Client, path: str, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    if path == INFER:
        request = tensor(1)
        return client.post(path, content=request["content"], headers=request["headers"] | names)
    return client.post(path, content=SAMPLE_CLIP.read_bytes(), headers=names)


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/embed", INFER])
def test_a_timeout_or_a_priority_that_is_none_is_refused(client: httpx.Client, path: str) -> None:
    for text in ("", "soon", "-1", "0", "0.0", "nan", "1e3", "1 s", "9" * 30):
        answer = post(client, path, X_Request_Timeout=text)
        assert answer.status_code == 400, text
        assert "X-Request-Timeout" in answer.text
    answer = post(client, path, X_Request_Priority="urgent")
    assert answer.status_code == 400
    assert "high, normal, low" in answer.text
    answer = post(client, path, X_Request_Timeout="60.5", X_Request_Priority="low")
    assert answer.status_code == 200


@pytest.mark.parametrize("parameters", [{"priority": 4}, {"priority": -1}])
def test_the_protocols_priority_is_one_of_three(client: httpx.Client, parameters: Any) -> None:
    answer = client.post(INFER, **tensor(**parameters))
    assert answer.status_code == 400
    assert "parameters.priority" in answer.json()["error"]


def test_what_is_late_in_the_queue_is_never_run(
    serve: Serve, pool: ThreadPoolExecutor, engine: Held, tmp_path: Path
) -> None:
    with serve(spool_dir=tmp_path, watch_interval_s=0) as client:
        first = occupy(client, pool, engine)
        late = post(client, "/v1/classify", X_Request_Timeout="1.5")
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert value(client, 'timesformer_rejected_total{code="deadline_exceeded"}') == 1
        assert value(client, 'timesformer_dropped_total{reason="deadline"}') == 1
        assert value(client, "timesformer_queue_clips{") == 0
        ran = len(engine.calls)
        engine.gate.set()
        assert first.result().status_code == 200
        assert client.post(INFER, **tensor(3)).status_code == 200
        assert len(engine.calls) == ran + 1, "only the last one was run"


def test_a_client_that_leaves_takes_its_clips_out_of_the_queue(
    serve: Serve, pool: ThreadPoolExecutor, engine: Held, tmp_path: Path
) -> None:
    with serve(spool_dir=tmp_path, watch_interval_s=0) as client:
        first = occupy(client, pool, engine)
        request = tensor(1)
        leaving = send(client, INFER, request["content"], **request["headers"])
        wait_until(lambda: value(client, "timesformer_queue_clips{") == 1)
        leaving.close()
        wait_until(lambda: value(client, "timesformer_queue_clips{") == 0)
        assert value(client, 'timesformer_dropped_total{reason="left"}') == 1
        assert value(client, 'timesformer_rejected_total{code="client_disconnected"}') == 1
        ran = len(engine.calls)
        engine.gate.set()
        assert first.result().status_code == 200
        assert client.post(INFER, **tensor(3)).status_code == 200
        assert len(engine.calls) == ran + 1


def test_clips_are_not_received_where_none_may_wait(
    serve: Serve, tmp_path: Path, engine: Held, pool: ThreadPoolExecutor
) -> None:
    # Without a key the body might ask for a higher priority, for which there is room.
    file = tmp_path / "keys.json"
    key, digest = new_key()
    write_keys(file, (ApiKey(name="k", sha256=digest, scopes=("infer",)),))
    limits = {"max_clips_per_request": 2, "max_queue_clips": 2}
    with serve(spool_dir=tmp_path, api_keys_file=file, **limits) as client:
        client.headers["X-API-Key"] = key
        running = occupy(client, pool, engine)
        waiting = pool.submit(client.post, INFER, **tensor(1, clips=2))
        wait_until(lambda: value(client, "timesformer_queue_clips") == 2)
        size = value(client, "timesformer_tensor_bytes")
        assert size > 3 * math.prod(SHAPE)
        with send(client, INFER, X_API_Key=key) as refused:  # of a body nothing is read
            answer = refused.recv(1000)
        assert b" 503 " in answer
        assert b"retry-after: " in answer.lower()
        assert value(client, 'timesformer_rejected_total{code="queue_full"}') == 1
        assert value(client, "timesformer_tensor_bytes") == size
        engine.gate.set()
        assert running.result().status_code == waiting.result().status_code == 200
        assert value(client, "timesformer_tensor_bytes") == 0
        for stage in ("upload", "queue", "inference", "total"):
            count = 'timesformer_stage_seconds_count{model="demo",stage="' + stage
            assert value(client, count) == 2


def test_a_keys_priority_is_what_its_requests_have_and_the_most_they_may_ask_for(
    serve: Serve, tmp_path: Path
) -> None:
    file, keys = tmp_path / "keys.json", {}
    entries = []
    for priority in ("high", "low"):
        keys[priority], digest = new_key()
        entries.append(
            ApiKey(name=priority, sha256=digest, scopes=("infer",), priority=priority)  # type: ignore[arg-type]
        )
    write_keys(file, tuple(entries))
    with serve(spool_dir=tmp_path, api_keys_file=file) as client:

        def ask(key: str, **headers: str) -> int:
            return post(client, INFER, X_API_Key=keys[key], **headers).status_code

        assert ask("high") == ask("low") == ask("high", X_Request_Priority="normal") == 200
        assert ask("low", X_Request_Priority="high") == 403
        assert ask("low", X_Request_Priority="low") == 200
        request = tensor(priority=1)
        request["headers"]["X-API-Key"] = keys["low"]
        assert client.post(INFER, **request).status_code == 403
        for priority in ("high", "normal", "low"):
            count = value(client, f'timesformer_queue_seconds_count{{priority="{priority}"}}')
            assert count == {"high": 1, "normal": 1, "low": 2}[priority]
