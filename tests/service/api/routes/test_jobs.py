"""`/v1/jobs` as clients use it: over a socket, with a folder that lasts."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.video import Window
from service.api.auth import ApiKey, new_key, write_keys
from service.decoding.messages import StreamMessage, StreamRequest
from service.decoding.process import DecoderProcess
from service.errors import DecoderUnavailableError, ModelUnavailableError, SpoolFullError
from service.jobs import results as job_results
from service.jobs import runner as job_work
from service.jobs.results import Draft, Results
from service.jobs.store import JobStore
from service.jobs.webhooks import Webhooks, sign, wait_after
from service.server.app import create_app, running
from service.settings import SettingsError, load_settings
from tests.service.long_video import write_long_video
from tests.service.registry.test_models import wait_until
from tests.service.web_server import Handler, web_server

URL = "/v1/jobs"
SECRET = b"sixteen bytes and more"


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("long")
    return write_long_video(folder / "a.mp4", 60, rate=5, side=32).read_bytes()


@pytest.fixture(scope="module")
def client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serve(jobs_dir=tmp_path_factory.mktemp("jobs")) as client:
        yield client


def eventually(ask: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
    found = None

    def is_wanted() -> bool:
        nonlocal found
        found = ask()
        return wanted(found)

    wait_until(is_wanted)
    return found


@pytest.fixture
def never_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run until they are cancelled."""

    async def do(*given: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(job_work, "do", do)


def add(client: httpx.Client, content: bytes, kind: str = "embed", **more: str) -> str:
    """Adds a job; returns its id."""
    accepted = client.post(URL, params={"kind": kind, **more}, content=content)
    assert accepted.status_code == 202
    return str(accepted.json()["id"])


def job_once(client: httpx.Client, job: str, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Returns the job once it is as wanted."""
    return eventually(lambda: client.get(f"{URL}/{job}").json(), wanted)


def ended(client: httpx.Client, job: str) -> dict[str, Any]:
    """Returns the job once it has ended."""
    return job_once(client, job, lambda found: found["state"] not in {"queued", "running"})


@pytest.mark.parametrize("kind", ["classify", "embed", "timeline"])
def test_a_job_has_the_result_that_its_endpoint_answers_with(
    client: httpx.Client, video: Path, kind: str
) -> None:
    content = video.read_bytes()
    accepted = client.post(URL, files={"file": content}, data={"kind": kind, "crops": "3"})
    assert accepted.status_code == 202
    job = accepted.json()
    assert accepted.headers["location"] == f"{URL}/{job['id']}"
    assert (job["state"], job["kind"], job["bytes"]) == ("queued", kind, len(content))
    assert job["parameters"] == {"crops": 3}
    done = ended(client, job["id"])
    assert (done["state"], done["attempts"], done["error"]) == ("done", 1, None)
    assert done["created"] <= done["started"] <= done["finished"]
    result = client.get(f"{URL}/{job['id']}/result")
    assert result.headers["content-type"] == "application/json"
    online = client.post(f"/v1/{kind}", params={"crops": 3}, content=content)
    if kind == "timeline":
        events = [json.loads(line) for line in online.text.splitlines()]
        windows = [event for event in events if event.pop("event") == "window"]
        assert result.json()["windows"] == windows
        assert result.json()["summary"]["windows"] == len(windows)
        assert result.json()["start"]["model"]["name"] == "demo"
    else:
        shared = online.json().keys() - {"timings_ms", "request_id"}
        assert result.json().keys() == shared
        assert {key: result.json()[key] for key in ("sampling", "video")} == {
            key: online.json()[key] for key in ("sampling", "video")
        }


def test_the_video_goes_when_the_job_has_ended(serve: Any, video: Path, tmp_path: Path) -> None:
    with serve(jobs_dir=tmp_path) as client:
        job = add(client, video.read_bytes())
        ended(client, job)
        eventually(lambda: list((tmp_path / "videos").iterdir()), lambda found: not found)
        counted = 'timesformer_jobs{state="done"} 1.0'
        text = eventually(lambda: client.get("/metrics").text, lambda text: counted in text)
        (result,) = (tmp_path / "results").iterdir()
        assert f"timesformer_jobs_bytes {result.stat().st_size}.0" in text
        client.delete(f"{URL}/{job}").raise_for_status()
        assert "timesformer_jobs_bytes 0.0" in client.get("/metrics").text
        assert list((tmp_path / "results").iterdir()) == []
        assert 'timesformer_jobs_ended_total{kind="embed",state="done"} 1.0' in text
        assert 'timesformer_job_seconds_count{kind="embed"} 1.0' in text


def test_a_job_that_fails_says_why_with_the_code_of_its_endpoint(client: httpx.Client) -> None:
    job = add(client, b"words", "timeline")
    failed = ended(client, job)
    assert failed["state"] == "failed"
    assert failed["error"]["code"] == "undecodable_video"
    answer = client.get(f"{URL}/{job}/result")
    assert answer.status_code == 422
    assert answer.json()["code"] == "undecodable_video"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({}, "kind"),
        ({"kind": "paint"}, "kind"),
        ({"kind": "timeline", "views": "2"}, "views"),
        ({"kind": "classify", "window": "2"}, "window"),
        ({"kind": "classify", "views": "0"}, "views"),
        ({"kind": "classify", "views": "11", "crops": "3"}, "views"),
        ({"kind": "embed", "colour": "red"}, "colour"),
    ],
)
def test_wrong_parameters_are_named_before_anything_is_accepted(
    client: httpx.Client, video: Path, parameters: dict[str, str], field: str
) -> None:
    answer = client.post(URL, files={"file": video.read_bytes()}, data=parameters)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field


def test_a_name_of_no_model_is_refused(client: httpx.Client) -> None:
    answer = client.post(URL, params={"kind": "embed", "model": "nobody"}, content=b"x")
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")


def test_without_a_folder_there_are_no_jobs_and_it_says_so(serve: Any) -> None:
    with serve() as client:
        for answer in (client.post(URL, content=b"x"), client.get(URL), client.get(f"{URL}/x")):
            assert answer.status_code == 409
            assert answer.json()["code"] == "jobs_off"
            assert "TIMESFORMER_JOBS_DIR" in answer.json()["detail"]


def test_two_servers_cannot_use_one_folder(serve: Any, tmp_path: Path) -> None:
    async def second() -> None:
        async with running(create_app(load_settings(jobs_dir=tmp_path, device="cpu"))):
            pass

    with serve(jobs_dir=tmp_path), pytest.raises(SettingsError, match="another process"):
        asyncio.run(second())


def test_a_running_job_is_cancelled_at_once_and_a_result_cannot_be_had(
    serve: Any, long_video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_message = DecoderProcess.next_message

    def held(decoder: DecoderProcess, request: StreamRequest) -> StreamMessage:
        message = next_message(decoder, request)
        while isinstance(message, Window) and message.number == 20 and not decoder.killed:
            time.sleep(0.02)
        return message

    monkeypatch.setattr(DecoderProcess, "next_message", held)
    with serve(jobs_dir=tmp_path) as client:
        job = add(client, long_video, "timeline")
        where = f"{URL}/{job}"
        seen = job_once(client, job, lambda job: bool(job["progress"]))
        assert 0 < seen["progress"]["windows"] <= seen["progress"]["of"]
        assert client.get(f"{where}/result").json()["code"] == "job_not_done"
        queued = add(client, long_video, "timeline")
        assert client.delete(where).json()["state"] == "cancelled"
        assert client.get(f"{where}/result").status_code == 409
        # The next begins, so the worker is free again.
        job_once(client, queued, lambda job: bool(job["progress"]))
        client.delete(f"{URL}/{queued}")
        assert client.delete(where).status_code == 200
        assert client.get(where).status_code == 404
        eventually(lambda: list((tmp_path / "videos").iterdir()), lambda found: not found)


def test_a_page_of_no_jobs_is_refused_as_described(client: httpx.Client) -> None:
    answer = client.get(URL, params={"limit": 0})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameters")
    described = client.get("/openapi.json").json()["paths"][URL]["get"]["responses"]["422"]
    assert list(described["content"]) == [answer.headers["content-type"]]


def test_job_is_seen_and_listed_by_its_owner_and_an_administrator_only(
    serve: Any, video: Path, tmp_path: Path
) -> None:
    keys, stored = {}, []
    for name, scope in (("ann", "infer"), ("bob", "infer"), ("root", "admin")):
        keys[name], digest = new_key()
        stored.append(ApiKey(name=name, sha256=digest, scopes=(scope,)))
    write_keys(tmp_path / "keys.json", tuple(stored))
    as_of = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    with serve(jobs_dir=tmp_path / "jobs", api_keys_file=tmp_path / "keys.json") as client:
        content = video.read_bytes()
        ask = {"params": {"kind": "embed"}, "content": content}
        assert client.post(URL, **ask).status_code == 401
        same = {"Idempotency-Key": "k"}
        job = client.post(URL, **ask, headers={**as_of["ann"], **same}).json()
        other = client.post(URL, **ask, headers={**as_of["bob"], **same}).json()
        assert other["id"] != job["id"]
        where = f"{URL}/{job['id']}"
        for answer in (
            client.get(where, headers=as_of["bob"]),
            client.get(f"{where}/result", headers=as_of["bob"]),
            client.delete(where, headers=as_of["bob"]),
            client.get(URL, params={"before": job["id"]}, headers=as_of["bob"]),
        ):
            assert answer.status_code == 404
            assert answer.json()["code"] == "job_not_found"
        for name, seen in (("ann", [job]), ("bob", [other]), ("root", [other, job])):
            listed, page = [], {"limit": "1"}
            while page.get("before", "first") is not None:
                answer = client.get(URL, params=page, headers=as_of[name]).json()
                listed += [found["id"] for found in answer["jobs"]]
                page["before"] = answer["next"]
            assert listed == [made["id"] for made in seen], "in pages, from new to old"
        assert client.get(where, headers=as_of["ann"]).status_code == 200
        assert client.get(where, headers=as_of["root"]).status_code == 200


@pytest.mark.usefixtures("never_done")
def test_so_many_wait_and_no_more(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.manager._MOST_WAITING", 1)
    with serve(jobs_dir=tmp_path) as client:
        ask = {"params": {"kind": "timeline"}, "content": b"a video"}
        first = client.post(URL, **ask).json()["id"]
        job_once(client, first, lambda job: job["state"] == "running")
        assert client.post(URL, **ask).status_code == 202
        answer = client.post(URL, **ask)
        assert answer.status_code == 503
        assert answer.json()["code"] == "jobs_full"
        assert int(answer.headers["retry-after"]) > 0
        assert len(list((tmp_path / "videos").iterdir())) == 2


@pytest.mark.usefixtures("never_done")
def test_the_quota_counts_what_is_kept(serve: Any, tmp_path: Path) -> None:
    quota = 150_000
    limits = ("max_jobs_bytes", "max_long_upload_bytes")
    with serve(jobs_dir=tmp_path, **dict.fromkeys(limits, quota)) as client:
        ask = {"params": {"kind": "timeline"}, "content": b"x" * 100_000}
        first = client.post(URL, **ask)
        assert first.status_code == 202
        refused = client.post(URL, **ask)
        assert refused.status_code == 503
        assert refused.json()["code"] == "spool_full"
        client.delete(f"{URL}/{first.json()['id']}")
        assert client.post(URL, **ask).status_code == 202


def test_ended_jobs_are_forgotten_after_their_time(serve: Any, video: Path, tmp_path: Path) -> None:
    with serve(jobs_dir=tmp_path, job_retention_s=1.0) as client:
        job = add(client, video.read_bytes())
        eventually(lambda: client.get(f"{URL}/{job}").status_code, lambda status: status == 404)


def test_a_result_that_grows_too_large_fails_with_a_code_of_its_own(
    serve: Any, long_video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.manager._MOST_RESULT_BYTES", 5000)
    with serve(jobs_dir=tmp_path) as client:
        job = add(client, long_video, "timeline")
        failed = ended(client, job)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "result_too_large")
        assert client.get(f"{URL}/{job}/result").status_code == 422
        eventually(lambda: files_in(tmp_path), lambda found: not found)
        assert "timesformer_jobs_bytes 0.0" in client.get("/metrics").text


def files_in(folder: Path) -> list[Path]:
    """Videos, results and what is being written."""
    return [
        path
        for part in ("videos", "results", "incoming")
        for path in (folder / part).rglob("*")
        if path.is_file()
    ]


@pytest.mark.parametrize(
    ("most_delays", "state", "code"), [(3, "done", None), (2, "failed", "decoder_unavailable")]
)
def test_job_that_is_deferred_is_done_later_or_fails_after_so_many_times(
    serve: Any,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most_delays: int,
    state: str,
    code: str | None,
) -> None:
    monkeypatch.setattr("service.jobs.manager._FIRST_DELAY_S", 0.05)
    monkeypatch.setattr("service.jobs.manager._MOST_DELAYS", most_delays)
    refusals = [DecoderUnavailableError(""), SpoolFullError(""), ModelUnavailableError("")]
    honest = job_work.do

    async def do(*given: Any) -> None:
        if refusals:
            raise refusals.pop()
        await honest(*given)

    monkeypatch.setattr(job_work, "do", do)
    with serve(jobs_dir=tmp_path) as client:
        job = ended(client, add(client, video.read_bytes()))
        assert (job["state"], job["attempts"], (job["error"] or {}).get("code")) == (state, 1, code)
        counted = f'timesformer_jobs_put_off_total{{kind="embed"}} {most_delays}.0'
        assert counted in client.get("/metrics").text


@pytest.mark.usefixtures("never_done")
def test_a_job_that_is_cancelled_while_it_is_claimed_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, honest = threading.Event(), JobStore.claim

    def claim(store: JobStore, now: float) -> Any:
        if store.counts()["queued"]:
            assert go_on.wait(60)
        return honest(store, now)

    app = create_app(load_settings(jobs_dir=tmp_path, spool_dir=tmp_path, device="cpu"))

    async def case() -> None:
        async with running(app):
            jobs = app.state.service.jobs
            monkeypatch.setattr(JobStore, "claim", claim)
            with jobs.incoming.file() as file:
                file.add(b"a video")
                file.write()
                asked = {"kind": "embed", "owner": "", "parameters": {}}
                none = dict.fromkeys(("idempotency", "source", "webhook"))
                job = await jobs.add(file.path, file.size, **asked, **none)
            cancelling = asyncio.create_task(jobs.cancel(job))
            await asyncio.sleep(0)  # its change stands behind the claim
            go_on.set()
            assert (await cancelling).state == "cancelled"
            async with asyncio.timeout(60):
                while jobs._running:  # noqa: ASYNC110 - it is of another task
                    await asyncio.sleep(0.01)

    asyncio.run(case())


def test_a_job_that_is_cancelled_while_its_result_is_kept_leaves_none(
    serve: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, go_on = threading.Event(), threading.Event()
    honest = job_results.move_durably

    def move(file: Path, place: Path) -> None:
        honest(file, place)
        moved.set()
        go_on.wait(60)

    monkeypatch.setattr(job_results, "move_durably", move)
    with serve(jobs_dir=tmp_path) as client:
        job = add(client, video.read_bytes())
        where = f"{URL}/{job}"
        assert moved.wait(60)
        cancelling = threading.Thread(target=client.delete, args=(where,))
        cancelling.start()
        eventually(lambda: client.get(where).json(), lambda job: job["state"] == "cancelled")
        go_on.set()
        cancelling.join(60)
        assert "timesformer_jobs_bytes 0.0" in client.get("/metrics").text
        assert files_in(tmp_path) == []


def test_nor_does_one_whose_time_is_over_then(
    serve: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Results.keep

    async def keep(results: Results, draft: Draft, job: str) -> None:
        await honest(results, draft, job)
        raise TimeoutError

    monkeypatch.setattr(Results, "keep", keep)
    with serve(jobs_dir=tmp_path) as client:
        job = add(client, video.read_bytes())
        assert ended(client, job)["error"]["code"] == "request_timeout"
        eventually(lambda: files_in(tmp_path), lambda found: not found)
        assert "timesformer_jobs_bytes 0.0" in client.get("/metrics").text


@pytest.mark.parametrize("ended_before", [False, True])
def test_a_full_disk_refuses_a_cancellation_and_the_job_is_as_it_was(
    serve: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_before: bool
) -> None:
    def full(*given: object) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    with serve(jobs_dir=tmp_path) as client:
        job = add(client, video.read_bytes())
        where = f"{URL}/{job}"
        if ended_before:
            ended(client, job)
        with monkeypatch.context() as patch:
            patch.setattr(JobStore, "remove" if ended_before else "cancel", full)
            answer = client.delete(where)
            assert (answer.status_code, answer.json()["code"]) == (503, "spool_full")
            assert int(answer.headers["retry-after"]) > 0
        assert ended(client, job)["state"] == "done"
        assert client.get(f"{where}/result").status_code == 200


def test_a_restart_knows_the_results_and_removes_what_no_job_has(
    serve: Any, video: Path, tmp_path: Path
) -> None:
    with serve(jobs_dir=tmp_path) as client:
        job = add(client, video.read_bytes())
        ended(client, job)
        result = client.get(f"{URL}/{job}/result").content
    (tmp_path / "results" / "job_of_nobody").write_bytes(b"{}")
    with serve(jobs_dir=tmp_path) as client:
        assert client.get(f"{URL}/{job}/result").content == result
        assert f"timesformer_jobs_bytes {len(result)}.0" in client.get("/metrics").text
        assert [path.name for path in (tmp_path / "results").iterdir()] == [job]


def test_a_job_may_have_a_url_which_no_answer_and_no_log_shows(
    serve: Any, video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    content = video.read_bytes()
    with (
        web_server(lambda handler: handler.say(200, content)) as host,
        serve(
            jobs_dir=tmp_path, source_hosts=host, source_http=True, source_private=True
        ) as client,
    ):
        url = f"http://{host}/a.mp4?signature=s3cret"
        accepted = client.post(URL, json={"kind": "classify", "source_url": url})
        assert accepted.status_code == 202
        job = ended(client, accepted.json()["id"])
        assert job["state"] == "done"
        result = client.get(f"{URL}/{job['id']}/result").json()
        refused = client.post(URL, json={"kind": "classify", "source_url": "http://10.0.0.1/"})
        assert refused.json()["code"] == "source_refused"
    assert result["video"]["duration_s"] == pytest.approx(2.0)
    assert "s3cret" not in accepted.text + json.dumps(job) + json.dumps(result)
    assert "s3cret" not in "".join(
        str(vars(record)) for record in caplog.records if record.name.startswith("service")
    )
    database = sqlite3.connect(tmp_path / "jobs.sqlite")
    assert database.execute("SELECT source FROM jobs").fetchall() == [(None,)]
    database.close()


def hooks(host: str, folder: Path, **more: object) -> dict[str, object]:
    """Settings that let a server of this machine be called."""
    secret = folder / "secret"
    secret.write_bytes(SECRET + b"\n")
    return {
        "jobs_dir": folder / "jobs",
        "webhook_hosts": host,
        "webhook_http": True,
        "webhook_private": True,
        "webhook_secret_file": secret,
        **more,
    }


def test_a_webhook_is_called_with_a_signature_and_again_if_it_fails(
    serve: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.webhooks._FIRST_WAIT_S", 0.1)
    monkeypatch.setattr("service.jobs.webhooks._GROWTH", 1.0)
    calls: list[tuple[str, dict[str, str], bytes]] = []
    statuses = iter([500, 302, 204])

    def answer(handler: Handler) -> None:
        calls.append((handler.path, dict(handler.headers), handler.body))
        handler.say(next(statuses), Location="http://127.0.0.1/elsewhere")

    with web_server(answer) as host, serve(**hooks(host, tmp_path)) as client:
        job = add(client, video.read_bytes(), webhook=f"http://{host}/hook?a=b")
        job_once(client, job, lambda found: found["webhook"] == "delivered")
        text = client.get("/metrics").text
    assert len(calls) == 3
    for path, headers, body in calls:
        assert path == "/hook?a=b"
        told = json.loads(body)
        assert (told["id"], told["state"]) == (job, "done")
        assert headers["webhook-id"] == job, "the same in all calls about one job"
        timestamp = headers["webhook-timestamp"]
        assert abs(time.time() - int(timestamp)) < 300
        assert headers == headers | sign(SECRET, job, int(timestamp), body)
    assert 'timesformer_webhooks_total{result="failed"} 2.0' in text
    assert 'timesformer_webhooks_total{result="done"} 1.0' in text


@pytest.mark.parametrize("private", [True, False])
def test_webhook_that_always_fails_is_given_up_and_a_private_address_never_called(
    serve: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    monkeypatch.setattr("service.jobs.webhooks._FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("service.jobs.webhooks._GROWTH", 1.0)
    monkeypatch.setattr("service.jobs.webhooks._MOST_CALLS", 2)
    calls: list[str] = []

    def answer(handler: Handler) -> None:
        calls.append(handler.path)
        handler.say(500)

    with (
        web_server(answer) as host,
        serve(**hooks(host, tmp_path, webhook_private=private)) as client,
    ):
        job = add(client, video.read_bytes(), webhook=f"http://{host}/")
        job_once(client, job, lambda found: found["webhook"] == "failed")
        assert client.get(f"{URL}/{job}/result").status_code == 200
    assert calls == (["/"] * 2 if private else [])


def test_hostile_webhooks_are_refused_before_anything_is_accepted(
    serve: Any, tmp_path: Path
) -> None:
    with serve(**hooks("hooks.example.org", tmp_path)) as client:
        for url in ("http://169.254.169.254/latest", "https://evil.example/"):
            answer = client.post(URL, params={"kind": "embed", "webhook": url}, content=b"x")
            assert (answer.status_code, answer.json()["code"]) == (422, "webhook_refused")
        assert client.get(URL).json()["jobs"] == []


def test_webhooks_are_off_by_default_and_need_a_secret(
    client: httpx.Client, video: Path, tmp_path: Path
) -> None:
    ask = {"kind": "embed", "webhook": "https://hooks.example.org/"}
    answer = client.post(URL, params=ask, content=video.read_bytes())
    assert answer.json()["code"] == "webhook_refused"
    short = tmp_path / "short"
    short.write_bytes(b"short")
    for file in (None, tmp_path / "nowhere", short):
        with pytest.raises(SettingsError, match="WEBHOOK_SECRET_FILE"):
            Webhooks(load_settings(webhook_hosts="hooks.example.org", webhook_secret_file=file))


def test_waits_grow_and_end() -> None:
    waits = [wait_after(calls) for calls in range(1, 9)]
    assert waits[:3] == [5.0, 20.0, 80.0]
    assert waits[-1] is None
