"""`POST /v1/timeline` as clients use it: over a socket, read while the service still works."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from model.video import Window
from service.decoding.messages import StreamMessage, StreamRequest
from service.decoding.process import DecoderCrashedError, DecoderProcess
from service.settings import Settings
from tests.service.long_video import worker_at, write_long_video
from tests.service.registry.test_models import wait_until

URL = "/v1/timeline"


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute."""
    return write_long_video(tmp_path_factory.mktemp("long") / "a.mp4", 60)


class Hold(NamedTuple):
    reached: threading.Event
    """A decoder is held."""
    released: threading.Event


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Hold:
    """Holds each long video at its twentieth window until it is released or its decoder killed."""
    reached, released = hold = Hold(threading.Event(), threading.Event())
    next_message = DecoderProcess.next_message

    def held(decoder: DecoderProcess, request: StreamRequest) -> StreamMessage:
        message = next_message(decoder, request)
        if isinstance(message, Window) and message.number == 20:
            reached.set()
            while not (decoder.killed or released.wait(0.02)):
                pass
        return message

    monkeypatch.setattr(DecoderProcess, "next_message", held)
    return hold


def events_in(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def metric(client: httpx.Client, name: str) -> float:
    (line,) = [
        line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")
    ]
    return float(line.split()[1])


def wait_for(client: httpx.Client, name: str, value: float) -> None:
    wait_until(lambda: metric(client, name) == value)


def test_it_sends_a_start_then_windows_and_segments_then_a_summary(
    client: httpx.Client, long_video: Path
) -> None:
    answer = client.post(URL, content=long_video.read_bytes(), params={"top_k": 2})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["cache-control"] == "no-store"
    start, *middle, summary = events_in(answer.text)
    assert start["event"] == "start"
    assert start["model"] == {"name": "demo", "version": "1"}
    assert start["window_s"] == pytest.approx(16 / 15, abs=1e-3)
    assert start["stride_s"] == pytest.approx(8 / 15, abs=1e-3)
    assert start["request_id"] == answer.headers["x-request-id"]
    windows = [event for event in middle if event["event"] == "window"]
    assert [window["number"] for window in windows] == list(range(start["windows"]))
    assert windows[0]["start_s"] == 0
    assert windows[-1]["end_s"] == pytest.approx(60, abs=0.2)
    assert {len(window["predictions"]) for window in windows} == {2}
    segments = [event for event in middle if event["event"] == "segment"]
    assert segments
    assert {segment["end_s"] > segment["start_s"] for segment in segments} == {True}
    assert summary["event"] == "summary"
    assert summary["windows"] == len(windows)
    assert summary["segments"] == len(segments)
    totals = {label["label"]: label["seconds"] for label in summary["labels"]}
    for label, seconds in totals.items():
        lengths = [s["end_s"] - s["start_s"] for s in segments if s["label"] == label]
        assert sum(lengths) == pytest.approx(seconds, abs=1e-2)
    assert summary["video"]["duration_s"] == pytest.approx(60, abs=0.2)


def test_a_window_of_the_whole_video_says_what_classify_says(
    client: httpx.Client, video: Path
) -> None:
    """A video shorter than its window is one window, sampled as `classify` samples short ones."""
    content = video.read_bytes()
    events = events_in(client.post(URL, content=content, params={"window": 5}).text)
    assert [event["event"] for event in events] == ["start", "window", "segment", "summary"]
    longer = {"window": 5, "crops": 3, "top_k": 12}
    window = events_in(client.post(URL, content=content, params=longer).text)[1]
    assert len(window["predictions"]) == 12
    assert sum(each["score"] for each in window["predictions"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "ask",
    [
        {"params": {"stride": "1", "format": "sse"}},
        {"params": {"stride": "1"}, "headers": {"Accept": "text/event-stream"}},
        {"data": {"stride": "1", "format": "sse"}},
    ],
    ids=["query", "header", "form"],
)
def test_server_sent_events_carry_the_same(client: httpx.Client, video: Path, ask: Any) -> None:
    content = video.read_bytes()
    body = {"files": {"file": content}} if "data" in ask else {"content": content}
    answer = client.post(URL, **body, **ask)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    names = [block[0].removeprefix("event: ") for block in blocks]
    data = [json.loads(block[1].removeprefix("data: ")) for block in blocks]
    plain = events_in(client.post(URL, content=content, params={"stride": "1"}).text)
    assert names == [event["event"] for event in data] == [event["event"] for event in plain]
    assert data[0]["stride_s"] == plain[0]["stride_s"] == 1
    assert data[1] == plain[1]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"window": "0"}, "window"),
        ({"stride": "5"}, "stride"),
        ({"stride": "0.05"}, "stride"),
        ({"smoothing": "4"}, ""),
        ({"close_score": "0.9"}, ""),
        ({"views": "2"}, "views"),
        ({"format": "xml"}, "format"),
    ],
)
def test_wrong_parameters_are_named(
    client: httpx.Client, video: Path, parameters: dict[str, str], field: str
) -> None:
    content = video.read_bytes()
    for answer in (
        client.post(URL, params=parameters, content=content),
        client.post(URL, files={"file": content}, data=parameters),
    ):
        assert answer.status_code == 422
        assert answer.json()["code"] == "invalid_parameters"
        assert answer.json()["errors"][0]["field"] == field


def test_more_windows_than_allowed_are_refused(
    serve: Any, long_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.inference.timeline.MOST_WINDOWS", 20)
    with serve() as client:
        answer = client.post(URL, content=long_video.read_bytes())
        assert answer.status_code == 413
        assert answer.json()["code"] == "video_too_large"
        assert "stride" in answer.json()["detail"]
        again = client.post(URL, content=long_video.read_bytes(), params={"window": 8, "stride": 8})
        assert again.status_code == 200


@pytest.mark.usefixtures("hold")
def test_windows_come_while_the_video_is_still_decoded(serve: Any, long_video: Path) -> None:
    """And a client that leaves ends it at once: decoder, upload and model are free again."""
    with serve() as client, client.stream("POST", URL, content=long_video.read_bytes()) as answer:
        lines = answer.iter_lines()
        seen = [json.loads(next(lines)) for _ in range(5)]
        assert [event["event"] for event in seen[:2]] == ["start", "window"]
        assert metric(client, "timesformer_timelines_running") == 1
        answer.close()
        wait_for(client, "timesformer_timelines_running", 0)
        assert metric(client, "timesformer_timeline_windows_total") < seen[0]["windows"]
        assert metric(client, "timesformer_spool_bytes") == 0
        text = client.get("/metrics").text
        assert 'timesformer_rejected_total{code="client_disconnected"} 1.0' in text
        assert 'timesformer_decoder_restarts_total{reason="decoder_crashed"} 0.0' in text


def test_an_error_after_the_start_is_an_event_with_its_code(
    serve: Any, long_video: Path, hold: Hold, tmp_path: Path
) -> None:
    """Here the decoder dies."""
    with serve(spool_dir=tmp_path) as client:
        with client.stream("POST", URL, content=long_video.read_bytes()) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert hold.reached.wait(120)
            os.kill(worker_at(tmp_path), signal.SIGKILL)
            hold.released.set()
            *_, last = lines
        event = json.loads(last)
        assert event["event"] == "error"
        assert event["code"] == "decoder_crashed"
        assert event["status"] == 422
        assert event["request_id"] == answer.headers["x-request-id"]
        text = client.get("/metrics").text
        assert 'timesformer_rejected_total{code="decoder_crashed"} 1.0' in text
        refused = client.post(URL, content=b"words")
        assert (refused.status_code, refused.json()["code"]) == (422, "undecodable_video")


@pytest.mark.parametrize("own", [False, True])
def test_a_timeline_that_does_not_begin_in_time_is_refused_with_a_status(
    serve: Any, video: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    def never(decoder: DecoderProcess, request: StreamRequest) -> StreamMessage:
        while not decoder.killed:
            time.sleep(0.02)
        raise DecoderCrashedError("decoder_crashed", "The video was abandoned.")

    monkeypatch.setattr(DecoderProcess, "next_message", never)
    headers = {"X-Request-Timeout": "0.3"} if own else {}
    monkeypatch.setattr(Settings, "timeline_timeout_s", 120 if own else 0.3)
    with serve() as client:
        answer = client.post(URL, content=video.read_bytes(), headers=headers)
        code = "deadline_exceeded" if own else "request_timeout"
        assert (answer.status_code, answer.json()["code"]) == (504, code)
        wait_for(client, "timesformer_timelines_running", 0)
        assert metric(client, "timesformer_spool_bytes") == 0


@pytest.mark.usefixtures("hold")
@pytest.mark.parametrize("own", [False, True])
def test_a_timeline_may_take_no_longer_than_its_limit(
    serve: Any, long_video: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in (1, 10, 60):  # a machine that is busy may not begin within the first
        headers = {"X-Request-Timeout": str(limit)} if own else {}
        monkeypatch.setattr(Settings, "timeline_timeout_s", 300 if own else limit)
        with serve() as client:
            answer = client.post(URL, content=long_video.read_bytes(), headers=headers)
        if answer.status_code == 200:
            break
    last = events_in(answer.text)[-1]
    code = "deadline_exceeded" if own else "request_timeout"
    assert (last["event"], last["code"]) == ("error", code)


def test_a_time_that_the_request_gives_itself_holds_for_its_upload_too(
    client: httpx.Client,
) -> None:
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, 60) as silent:
        head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nX-Request-Timeout: 0.5\r\nContent-Length: 9\r\n"
        silent.sendall(head.encode() + b"\r\n")
        answer = b""
        while not answer.endswith(b"}") and (block := silent.recv(2000)):
            answer += block
    assert b'"code":"deadline_exceeded"' in answer


@pytest.mark.usefixtures("hold")
def test_while_too_many_wait_more_are_refused(
    serve: Any, long_video: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "timeline_workers", 1)
    with serve() as client, ThreadPoolExecutor(1) as threads:
        with client.stream("POST", URL, content=long_video.read_bytes()) as running:
            lines = running.iter_lines()
            next(lines)
            waiting = threads.submit(
                httpx.post, f"{client.base_url}{URL}", content=video.read_bytes(), timeout=120
            )
            wait_for(client, "timesformer_timelines_waiting", 1)
            answer = client.post(URL, content=b"words")
        assert answer.status_code == 503
        assert answer.json()["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        assert events_in(waiting.result().text)[-1]["event"] == "summary"
