"""`POST /v1/classify` as clients use it: over a socket, with real bytes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle.bundle import BundleStore
from export.runtime import load_runtime
from model.demo import STORE
from model.scores import mean_scores
from model.video import load_clips
from service.errors import QueueFullError
from service.ingest.spool import SpoolFile
from service.ingest.upload_rate import Watch
from tests.service.conftest import Serve, send
from tests.service.registry.test_models import metric, wait_until

URL = "/v1/classify"


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    return dict(body)


def spool_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_scores_are_the_mean_softmax_of_the_network_on_the_views(
    client: httpx.Client, video: Path
) -> None:
    answer = client.post(
        URL, params={"views": 2, "crops": 3, "top_k": 100}, content=video.read_bytes()
    ).json()
    bundle = BundleStore(STORE).open("demo")
    clips = load_clips(video, bundle.config.preprocessing, views=2, crops=3)
    logits = load_runtime(bundle, "cpu").run(clips.frames).logits
    scores = mean_scores(logits, bundle.manifest.temperature)
    assert len(answer["predictions"]) == len(bundle.manifest.labels)
    for prediction in answer["predictions"]:
        assert prediction["label"] == bundle.manifest.labels[prediction["class_index"]]
        assert prediction["score"] == pytest.approx(scores[prediction["class_index"]], abs=1e-5)
    ordered = [prediction["score"] for prediction in answer["predictions"]]
    assert ordered == sorted(ordered, reverse=True)


def test_the_answer_says_what_was_looked_at_and_by_whom(client: httpx.Client, video: Path) -> None:
    answer = client.post(URL, params={"views": 2}, content=video.read_bytes()).json()
    assert answer["model"] == {"name": "demo", "version": "1"}
    assert answer["sampling"]["mode"] == "dense"
    assert np.shape(answer["sampling"]["times_s"]) == (2, 8)
    assert answer["video"]["width"] == 96
    assert answer["video"]["height"] == 64
    assert answer["video"]["frames"] == 60
    assert answer["video"]["duration_s"] == pytest.approx(2.0)
    assert answer["video"]["truncated"] is False
    timings = answer["timings_ms"]
    parts = timings["upload"] + timings["decode"] + timings["queue"] + timings["inference"]
    assert 0 < parts <= timings["total"]


def test_parameters_of_the_form_win_over_the_query(client: httpx.Client, video: Path) -> None:
    answer = client.post(
        URL,
        params={"top_k": 3},
        files={"file": video.read_bytes()},
        data={"top_k": "1", "views": "2"},
    ).json()
    assert len(answer["predictions"]) == 1
    assert answer["sampling"]["views"] == 2


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": "0"},
        {"top_k": "many"},
        {"views": "0"},
        {"views": "31"},
        {"crops": "2"},
        {"crops": "three"},
        {"threshold": "1.5"},
        {"threshold": "nan"},
        {"topk": "3"},
        {"views": "11", "crops": "3"},
    ],
)
def test_wrong_parameters_are_named_in_query_and_form(
    client: httpx.Client, video: Path, parameters: dict[str, str]
) -> None:
    content = video.read_bytes()
    for response in (
        client.post(URL, params=parameters, content=content),
        client.post(URL, files={"file": content}, data=parameters),
    ):
        body = problem(response, 422, "invalid_parameters")
        assert body["errors"][0]["field"] in {*parameters, "views"}


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 422, "empty_file"),
        (b"these are words, not a video", 422, "undecodable_video"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", 422, "undecodable_video"),
    ],
)
def test_what_is_no_video_is_refused_with_a_stable_code(
    client: httpx.Client, content: bytes, status: int, code: str
) -> None:
    problem(client.post(URL, content=content), status, code)


def test_no_path_of_the_server_is_in_an_answer(client: httpx.Client, video: Path) -> None:
    for content in (b"words", video.read_bytes()[:400], b""):
        assert "timesformer-upload" not in client.post(URL, content=content).text


def test_a_malformed_form_is_refused_with_the_reason(client: httpx.Client) -> None:
    for kind, content, message in (
        ("multipart/form-data", b"x", "no boundary"),
        ("multipart/form-data; boundary=b", b"nonsense", "cannot be read"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", "0 parts"),
    ):
        answer = client.post(URL, headers={"content-type": kind}, content=content)
        assert message in problem(answer, 400, "bad_request")["detail"]


def test_a_form_in_pieces_of_any_size_is_answered_as_the_raw_body(
    client: httpx.Client, video: Path
) -> None:
    request = client.build_request("POST", URL, files={"file": video.read_bytes()})
    body = request.read()
    pieces = (body[start : start + 97] for start in range(0, len(body), 97))
    answer = client.post(
        URL, content=pieces, headers={"content-type": request.headers["content-type"]}
    )
    raw = client.post(URL, content=video.read_bytes())
    assert answer.json()["predictions"] == raw.json()["predictions"]


def test_uploads_over_the_limit_are_refused_announced_or_not(serve: Any, tmp_path: Path) -> None:
    with serve(max_upload_bytes=10_000, spool_dir=tmp_path) as client:
        for content in (b"x" * 10_001, (b"x" * 1000 for _ in range(11))):
            problem(client.post(URL, content=content), 413, "upload_too_large")
        for content in (b"x" * 10_001, (b"x" * 1000 for _ in range(11))):
            assert client.post("/v2/models/demo/infer", content=content).status_code == 413
        assert spool_files(tmp_path) == []


@pytest.mark.parametrize("path", [URL, "/v1/timeline", "/v2/models/demo/infer"])
def test_a_body_has_to_come_at_a_least_rate(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    noted: list[int] = []
    monkeypatch.setattr("service.ingest.upload_rate._WINDOW_S", 0.3)
    monkeypatch.setattr("service.ingest.upload_rate._LONG_WINDOW_S", 0.3)
    with serve(min_upload_rate=100, spool_dir=tmp_path) as client:
        with send(client, path, length=9) as silent:
            answer = silent.recv(2000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert spool_files(tmp_path) == []
        monkeypatch.setattr(Watch, "note", lambda watch, count: noted.append(count))
        client.post(path, content=b"x" * 1_000_000)
        assert sum(noted) > 100_000


def test_the_time_that_the_disk_takes_is_not_the_senders(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[bool] = []
    while_paused: list[bool] = []
    pause, write = Watch.paused, SpoolFile.write

    @contextlib.contextmanager
    def observed(watch: Watch) -> Iterator[None]:
        with pause(watch):
            paused.append(True)
            yield
            paused.pop()

    def observe(file: SpoolFile) -> None:
        while_paused.append(bool(paused))
        write(file)

    monkeypatch.setattr(Watch, "paused", observed)
    monkeypatch.setattr(SpoolFile, "write", observe)
    client.post(URL, content=(b"x" * 700_000 for _ in range(2)))
    assert while_paused == [True, True]


def test_what_is_announced_and_does_not_come_takes_no_room_from_others(
    serve: Any, video: Path, tmp_path: Path
) -> None:
    limits = dict.fromkeys(("max_upload_bytes", "max_long_upload_bytes"), 1_000_000)
    with (
        serve(**limits, max_spool_bytes=1_200_000, spool_dir=tmp_path) as client,
        contextlib.ExitStack() as stack,
    ):

        def begin(content: bytes) -> socket.socket:
            return stack.enter_context(send(client, URL, content, length=1_000_000))

        def spooled() -> float:
            return metric(client, "timesformer_spool_bytes")

        for _ in range(10):
            begin(b"abc")
        wait_until(lambda: spooled() == 30)
        assert client.post(URL, content=video.read_bytes()).status_code == 200
        begin(b"x" * 900_000)
        wait_until(lambda: spooled() == 900_030)
        assert b" 503 " in begin(b"").recv(1000)  # it could not fit, so it is not waited for


def test_an_answer_that_takes_too_long_is_a_504(serve: Any, video: Path, tmp_path: Path) -> None:
    with serve(request_timeout_s=0.001, spool_dir=tmp_path) as client:
        problem(client.post(URL, content=video.read_bytes()), 504, "request_timeout")


def test_clients_at_once_get_what_each_gets_alone(client: httpx.Client, video: Path) -> None:
    content = video.read_bytes()
    shapes = [{"views": 1}, {"views": 2}, {"crops": 3}, {"views": 2, "crops": 3}]

    def scores(shape: dict[str, int]) -> dict[int, float]:
        answer = httpx.post(f"{client.base_url}{URL}", params=shape, content=content, timeout=120)
        return {each["class_index"]: each["score"] for each in answer.json()["predictions"]}

    alone = [scores(shape) for shape in shapes]
    with ThreadPoolExecutor(len(shapes)) as threads:
        together = list(threads.map(scores, shapes))
    assert together == [pytest.approx(own, abs=2e-6) for own in alone]


def test_a_video_that_there_is_no_room_for_is_refused_before_it_is_read(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise QueueFullError(7)

    with serve(spool_dir=tmp_path) as client:
        for place in (
            "service.inference.batcher.Batcher.check_room",
            "service.decoding.pool.DecoderPool.check_room",
        ):
            with monkeypatch.context() as patch:
                patch.setattr(place, full)
                with send(client, URL, b"begins", length=9000) as sender:
                    answer = sender.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 7" in answer.lower()


def test_more_views_than_are_allowed_are_wrong_and_no_matter_of_room(
    serve: Serve, tmp_path: Path
) -> None:
    """More than the queue holds would never fit, however often the client retries."""
    with serve(max_queue_clips=100, spool_dir=tmp_path) as client:
        for views in (31, 400):
            answer = client.post(URL, params={"views": views}, content=b"never read")
            assert answer.status_code == 422
            assert answer.json()["errors"][0]["message"] == "views x crops may be 30 at most"
