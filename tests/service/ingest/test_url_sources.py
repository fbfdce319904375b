"""`source_url`: a video that the service reads itself, from hosts that are listed."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.web_server import Handler, web_server

URL = "/v1/classify"


def open_to(host: str, **more: object) -> dict[str, object]:
    """Settings that let videos be read from a server of this machine."""
    return {"source_hosts": host, "source_http": True, "source_private": True, **more}


def test_a_url_gets_the_answer_that_an_upload_gets(serve: Any, video: Path) -> None:
    content = video.read_bytes()
    asked: list[str] = []

    def answer(handler: Handler) -> None:
        asked.append(handler.path)
        assert handler.headers["Host"] == host
        handler.say(200, content)

    with web_server(answer) as host, serve(**open_to(host)) as client:
        url = f"http://{host}/a%20b.mp4?signature=x%2Fy"
        uploaded = client.post(URL, content=content, params={"views": 2}).json()
        for reply in (
            client.post(URL, json={"source_url": url, "views": 2}),
            client.post(URL, files={"source_url": (None, url), "views": (None, "2")}),
            client.post(f"{URL}?views=2", json={"source_url": url}),
        ):
            assert reply.status_code == 200, reply.text
            assert reply.json()["predictions"] == uploaded["predictions"]
            assert reply.json()["sampling"] == uploaded["sampling"]
        assert client.post("/v1/embed", json={"source_url": url}).status_code == 200
        events = client.post("/v1/timeline", json={"source_url": url, "stride": 0.5}).text
        assert json.loads(events.splitlines()[-1])["event"] == "summary"
        text = client.get("/metrics").text
    assert set(asked) == {"/a%20b.mp4?signature=x%2Fy"}
    assert 'timesformer_source_seconds_count{result="done"} 5.0' in text
    assert "timesformer_spool_bytes 0.0" in text


def test_it_is_off_by_default(client: httpx.Client) -> None:
    answer = client.post(URL, json={"source_url": "https://videos.example.org/a.mp4"})
    assert answer.status_code == 422
    assert answer.json()["code"] == "source_refused"
    assert "TIMESFORMER_SOURCE_HOSTS" in answer.json()["detail"]


def test_hosts_that_are_not_listed_are_refused(serve: Any) -> None:
    with serve(source_hosts="videos.example.org", source_http=True) as client:
        for url in ("http://169.254.169.254/", "https://evil.example/", "x"):
            answer = client.post(URL, json={"source_url": url})
            assert (answer.status_code, answer.json()["code"]) == (422, "source_refused")


def test_a_listed_host_with_a_private_address_is_refused(serve: Any) -> None:
    asked: list[str] = []
    with (
        web_server(lambda handler: asked.append(handler.path)) as host,
        serve(source_hosts=host, source_http=True) as client,
    ):
        answer = client.post(URL, json={"source_url": f"http://{host}/"})
    assert answer.json()["code"] == "source_refused"
    assert "public" in answer.json()["detail"]
    assert asked == []


def test_a_redirect_is_not_followed_and_of_a_url_only_the_host_is_logged(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asked: list[str] = []

    def answer(handler: Handler) -> None:
        asked.append(handler.path)
        handler.say(302, Location=f"http://{host}/?signature=s3cret")

    with web_server(answer) as host, serve(**open_to(host)) as client:
        reply = client.post(URL, json={"source_url": f"http://{host}/key?signature=s3cret"})
    assert (reply.status_code, reply.json()["code"]) == (422, "source_failed")
    assert "redirect" in reply.json()["detail"]
    assert asked == ["/key?signature=s3cret"]
    assert "s3cret" not in reply.text
    lines = [str(vars(record)) for record in caplog.records]
    assert any("service" in line for line in lines)
    assert "s3cret" not in "".join(lines)


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (lambda handler: handler.say(404, b"secret"), 422, "source_failed"),
        (lambda handler: handler.say(200, b"x", Content_Length="100"), 422, "source_failed"),
        (lambda handler: handler.say(200, b"x", Content_Encoding="gzip"), 422, "source_failed"),
        (lambda handler: handler.say(200, Content_Length="9999999"), 413, "upload_too_large"),
        (lambda handler: handler.say(200, b"no video"), 422, "undecodable_video"),
        (lambda handler: handler.say(200), 422, "empty_file"),
    ],
)
def test_what_the_host_does_wrong_is_a_refusal_of_ours(
    serve: Any, answer: Any, status: int, code: str
) -> None:
    with web_server(answer) as host, serve(**open_to(host, max_upload_bytes=1_000_000)) as client:
        reply = client.post(URL, json={"source_url": f"http://{host}/"})
        assert "timesformer_spool_bytes 0.0" in client.get("/metrics").text
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert "secret" not in reply.text


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


def test_a_file_without_end_is_cut_off_at_the_limit(serve: Any) -> None:
    with web_server(endless) as host, serve(**open_to(host, max_upload_bytes=500_000)) as client:
        reply = client.post(URL, json={"source_url": f"http://{host}/"})
    assert reply.status_code == 413


def dripping(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def test_a_host_that_drips_is_given_up_after_the_time_of_an_upload(serve: Any) -> None:
    with web_server(dripping) as host, serve(**open_to(host, upload_timeout_s=1.0)) as client:
        reply = client.post(URL, json={"source_url": f"http://{host}/"})
    assert reply.status_code == 408
    assert reply.json()["code"] == "upload_timeout"


def test_when_the_client_leaves_the_reading_ends(serve: Any) -> None:
    begun, over = threading.Event(), threading.Event()

    def answer(handler: Handler) -> None:
        begun.set()
        try:
            dripping(handler)
        finally:
            over.set()

    with web_server(answer) as host, serve(**open_to(host)) as client:
        body = json.dumps({"source_url": f"http://{host}/"}).encode()
        with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
            leaving.sendall(
                b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (URL.encode(), len(body), body)
            )
            assert begun.wait(60)
        assert over.wait(60)


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"{}", b'{"source_url": 5}', b'{"source_url": "x", "views": [1]}', b'"x"'],
)
def test_a_json_body_that_is_none_of_ours_is_refused(client: httpx.Client, body: bytes) -> None:
    answer = client.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["code"] == "bad_request"


def test_a_video_and_a_url_together_are_refused(client: httpx.Client, video: Path) -> None:
    form = {"file": video.read_bytes(), "source_url": (None, "https://videos.example.org/a.mp4")}
    answer = client.post(URL, files=form)
    assert answer.status_code == 400
