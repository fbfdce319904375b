"""`timesformer serve --workers 2`: one service, whichever process a connection comes to."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from export.bundle import BundleStore
from model.demo import SAMPLE_CLIP
from service.auth import ApiKey, new_key, write_keys
from service.spool import Spool
from tests.e2e.conftest import TIMESFORMER, run_service
from tests.e2e.test_serving import PATIENT, children_of, left_after_a_moment, read_all, stall
from tests.service.test_models import DEMO, publish

pytestmark = pytest.mark.timeout(1200)  # a start is that of five processes
VIDEO = SAMPLE_CLIP.read_bytes()


class Pair(NamedTuple):
    """A service with two workers, and what it was given."""

    service: Any
    store: BundleStore
    spool: Path
    admin: dict[str, str]
    limited: dict[str, str]

    @property
    def port(self) -> int:
        return int(self.service.client.base_url.port)


@pytest.fixture(scope="module")
def pair(short_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    store = BundleStore(folder / "store")
    publish(store)
    publish(store)
    store.activate("demo", "1")
    secrets = {}
    keys = []
    for name, scope, rate in (("root", "admin", None), ("ann", "infer", 5)):
        secrets[name], digest = new_key()
        keys.append(ApiKey(name=name, sha256=digest, scopes=(scope,), requests_per_minute=rate))  # type: ignore[arg-type]
    write_keys(folder / "keys", tuple(keys))
    flags = {
        "workers": "2",
        "decode-workers": "2",
        "spool-dir": str(short_folder),
        "store": str(store.root),
        "watch-interval-s": "0.1",
        "api-keys-file": str(folder / "keys"),
        "jobs-dir": str(folder / "jobs"),
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", value)]
    with run_service(*given) as service:
        headers = {name: {"Authorization": f"Bearer {key}"} for name, key in secrets.items()}
        service.client.headers.update(headers["root"])
        yield Pair(service, store, short_folder, headers["root"], headers["ann"])


# ---- what is seen of the processes ---------------------------------------------------------------


def workers_of(pid: int) -> set[int]:
    """Its children that have decoders of their own."""
    return {child for child in children_of(pid) if children_of(child)}


def family_of(pid: int) -> set[int]:
    below = children_of(pid)
    return below.union(*map(family_of, below))


def worker_at(connection: http.client.HTTPConnection, workers: set[int]) -> int:
    """The process at the other end."""
    ours, theirs = connection.sock.getsockname()[1], connection.sock.getpeername()[1]
    ends = f":{theirs:04X}", f":{ours:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if (fields[1][-5:], fields[2][-5:]) == ends:
            for worker in workers:
                for descriptor in Path(f"/proc/{worker}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(descriptor.readlink()) == f"socket:[{fields[9]}]":
                            return worker
    raise AssertionError("no worker has the connection")


@contextlib.contextmanager
def one_connection_each(pair: Pair) -> Iterator[list[http.client.HTTPConnection]]:
    workers = workers_of(pair.service.process.pid)
    assert len(workers) == 2
    found: dict[int, http.client.HTTPConnection] = {}
    with contextlib.ExitStack() as stack:
        while len(found) < 2:
            connection = http.client.HTTPConnection("127.0.0.1", pair.port, timeout=300)
            stack.callback(connection.close)
            connection.request("GET", "/health/live")
            assert connection.getresponse().read() == b'{"live":true}'
            found.setdefault(worker_at(connection, workers), connection)
        yield list(found.values())


def metric(client: httpx.Client, line: str) -> float:
    text = client.get("/metrics").text
    return sum(float(row.split()[-1]) for row in text.splitlines() if row.startswith(line))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def infer_body(clips: int) -> tuple[bytes, dict[str, str]]:
    config = DEMO.config
    shape = [clips, config.num_frames, config.image_size, config.image_size, 3]
    frames = np.random.default_rng(clips).integers(0, 256, shape, np.uint8)
    tensor = {"name": "frames", "datatype": "UINT8", "shape": shape}
    inputs = [{**tensor, "parameters": {"binary_data_size": frames.nbytes}}]
    head = json.dumps({"inputs": inputs}).encode()
    return head + frames.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def post_on(
    connection: http.client.HTTPConnection,
    key: dict[str, str],
    path: str,
    content: bytes,
    **more: str,
) -> Any:
    connection.request("POST", path, content, {**key, **more})
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, body
    return json.loads(body)


# ---- one service ---------------------------------------------------------------------------------


def test_each_worker_answers_as_the_only_one_would(pair: Pair, service: Any) -> None:
    body, headers = infer_body(3)
    alone = service.client.post("/v1/classify?views=2&top_k=3", content=VIDEO).json()
    vector = service.client.post("/v1/embed", content=VIDEO).json()
    outputs = service.client.post("/v2/models/demo/infer", content=body, headers=headers).json()
    with one_connection_each(pair) as connections:
        for connection in connections:
            post = functools.partial(post_on, connection, pair.admin)
            ours = post("/v1/classify?views=2&top_k=3", VIDEO)
            assert ours["model"] == {"name": "demo", "version": "1"}
            for item, other in zip(ours["predictions"], alone["predictions"], strict=True):
                assert item["label"] == f"1: {other['label']}"
                assert item["score"] == pytest.approx(other["score"], abs=1e-4)
            assert (ours["sampling"], ours["video"]) == (alone["sampling"], alone["video"])
            assert set(ours["timings_ms"]) == set(alone["timings_ms"])
            assert post("/v1/embed", VIDEO)["embedding"] == pytest.approx(
                vector["embedding"], abs=1e-3
            )
            tensors = post("/v2/models/demo/infer", body, **headers)["outputs"]
            for tensor, other in zip(tensors, outputs["outputs"], strict=True):
                assert tensor["shape"] == other["shape"]
                assert tensor["data"] == pytest.approx(other["data"], abs=1e-3)


def test_there_is_one_engine_and_no_worker_loads_what_runs_it(pair: Pair) -> None:
    pid = pair.service.process.pid
    text = pair.service.client.get("/metrics").text
    assert len(re.findall("^timesformer_model_info{", text, re.MULTILINE)) == 1
    assert "onnxruntime" in Path(f"/proc/{pid}/maps").read_text()
    for worker in workers_of(pid):
        maps = Path(f"/proc/{worker}/maps").read_text()
        assert "onnxruntime" not in maps
        assert "libtorch" not in maps
    assert "timesformer_workers 2.0" in text
    assert "timesformer_decoders 2.0" in text


def test_a_batch_has_clips_of_requests_to_both_workers(pair: Pair) -> None:
    body, headers = infer_body(1)
    mixed = threading.Event()

    def post(connection: http.client.HTTPConnection) -> None:
        while not mixed.is_set():
            post_on(connection, pair.admin, "/v2/models/demo/infer", body, **headers)

    def batches() -> float:
        """Of more than one clip."""
        text = pair.service.client.get("/metrics").text
        bucket = r'^timesformer_batch_clips_bucket{le="%s",model="demo"} (\S+)'
        counts = [re.findall(bucket % le, text, re.MULTILINE) for le in ("1.0", r"\+Inf")]
        return float(counts[1][0]) - float(counts[0][0]) if all(counts) else 0.0

    before = batches()
    with one_connection_each(pair) as connections, concurrent.futures.ThreadPoolExecutor(2) as pool:
        loops = [pool.submit(post, connection) for connection in connections]
        try:
            # Each has one clip on its way: a batch of two has one of each.
            wait_until(lambda: batches() > before)
        finally:
            mixed.set()
        for loop in loops:
            loop.result()


def test_the_rate_of_a_key_is_that_of_the_service(pair: Pair) -> None:
    statuses = []
    with one_connection_each(pair) as connections:
        for connection in connections * 4:
            connection.request("POST", "/v1/classify", VIDEO, pair.limited)
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
    assert statuses == [200] * 5 + [429] * 3


def test_what_workers_do_not_do_themselves_is_there_as_well(pair: Pair, service: Any) -> None:
    ours, alone = pair.service.client, service.client
    assert ours.get("/openapi.json").json() == alone.get("/openapi.json").json()
    for path in ("/", "/docs", "/docs/swagger-ui.css"):
        page, other = ours.get(path), alone.get(path)
        assert (page.status_code, page.content) == (200, other.content)
        assert page.headers.get_list("date")[1:] == []
        assert page.headers["content-security-policy"] == other.headers["content-security-policy"]
    assert ours.head("/docs").status_code == alone.head("/docs").status_code
    refused = ours.get("/v1/classify")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert ours.get("/nowhere").json()["code"] == "not_found"
    assert ours.get("/v1/admin/models").json()["models"][0]["serving"] == "1"
    assert ours.get("/v1/models").json()["models"][0]["name"] == "demo"
    with ours.stream("POST", "/v1/timeline", content=iter([VIDEO[:1000], VIDEO[1000:]])) as answer:
        events = [json.loads(line)["event"] for line in answer.iter_lines()]
    assert (events[0], events[-1]) == ("start", "summary")
    job = ours.post("/v1/jobs?kind=classify", files={"file": VIDEO}).json()["id"]
    wait_until(lambda: ours.get(f"/v1/jobs/{job}").json()["state"] == "done")
    assert ours.get(f"/v1/jobs/{job}/result").json()["predictions"]


def test_errors_are_what_they_are_with_one_worker(pair: Pair) -> None:
    post = pair.service.client.post
    unknown = post("/v1/classify?model=other", content=VIDEO)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "model_not_found")
    assert post("/v1/classify", content=b"no video").json()["code"] == "undecodable_video"
    assert post("/v1/classify?views=0", content=VIDEO).json()["code"] == "invalid_parameters"
    late = post("/v1/classify", content=VIDEO, headers={"X-Request-Timeout": "0.000001"})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    bare = httpx.post(f"{pair.service.client.base_url}/v1/classify", content=VIDEO, timeout=300)
    assert (bare.status_code, bare.headers["www-authenticate"]) == (401, "Bearer")
    body, headers = infer_body(1)
    missing = post("/v2/models/demo/versions/9/infer", content=body, headers=headers)
    assert (missing.status_code, missing.json()) == (
        404,
        {"error": "no such version serves here; 'demo' has 1"},
    )


def test_ids_of_requests_and_traces_go_through(pair: Pair) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    for name, path in (("hot", "/v1/classify"), ("forwarded", "/v1/timeline")):
        headers = {"X-Request-ID": name, "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        answer = pair.service.client.post(path, content=VIDEO, headers=headers)
        assert answer.headers.get_list("x-request-id") == [name]
        assert f'"{name}"' in answer.text

        def logged(name: str = name) -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in pair.service.log if f'"{name}"' in line]
            return [line for line in lines if line["message"] == "request"]

        wait_until(lambda logged=logged: bool(logged()))  # type: ignore[misc]
        assert [line["trace_id"] for line in logged()] == [trace]


# ---- that goes on --------------------------------------------------------------------------------


class Load:
    """Clients in a loop, each with a connection of its own, which it renews when it is cut."""

    def __init__(self, pair: Pair, clients: int = 6) -> None:
        self.answers: list[httpx.Response] = []
        self.cut = 0
        self._pair = pair
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._loop) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: len(self.answers) >= len(self._threads))
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _loop(self) -> None:
        url = f"{self._pair.service.client.base_url}/v1/classify"
        while not self._done.is_set():
            with httpx.Client(timeout=300, headers=self._pair.admin) as client:
                try:
                    while not self._done.is_set():
                        self.answers.append(client.post(url, content=VIDEO))
                except httpx.TransportError:
                    self.cut += 1


def test_a_swap_under_load_loses_nothing_and_mixes_nothing(pair: Pair) -> None:
    client = pair.service.client
    with Load(pair) as load:
        for version in ("2", "1", "2", "1"):
            pair.store.activate("demo", version)
            wait_until(
                lambda version=version: (
                    client.get("/health/ready").json()["model"]["version"] == version
                )
            )
            seen = len(load.answers)
            wait_until(lambda seen=seen: len(load.answers) >= seen + 8)
    assert load.cut == 0
    assert {answer.status_code for answer in load.answers} == {200}
    answers = [answer.json() for answer in load.answers]
    assert {answer["model"]["version"] for answer in answers} == {"1", "2"}
    for answer in answers:
        mark = f"{answer['model']['version']}: "
        assert all(item["label"].startswith(mark) for item in answer["predictions"])


def test_a_worker_that_is_killed_costs_its_own_requests_and_is_replaced(pair: Pair) -> None:
    client, clients = pair.service.client, 6
    answered = 'timesformer_requests_total{method="POST",route="/v1/classify",status="200"}'
    victim, other = sorted(workers_of(pair.service.process.pid))
    below = children_of(victim)
    with Load(pair, clients) as load:
        before = metric(client, answered)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "timesformer_worker_restarts_total 1.0" in scrape(pair))
        assert metric(client, answered) >= before
        wait_until(lambda: "timesformer_workers 2.0" in scrape(pair))
        seen = len(load.answers)
        wait_until(lambda: len(load.answers) >= seen + 20)
    assert load.cut <= clients
    assert {answer.status_code for answer in load.answers} == {200}
    assert left_after_a_moment({victim, *below}) == set()
    workers = workers_of(pair.service.process.pid)
    assert other in workers
    assert len(workers) == 2
    with one_connection_each(pair) as connections:
        for connection in connections:
            post_on(connection, pair.admin, "/v1/classify", VIDEO)
    # The new one has removed what the killed one had in its spool.
    assert len(list(pair.spool.glob("timesformer-spool-*"))) == 3


def scrape(pair: Pair) -> str:
    """Over connections of its own: one to the killed worker is cut."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{pair.service.client.base_url}/metrics", timeout=300).text
    return ""


# ---- and ends ------------------------------------------------------------------------------------


def test_on_sigterm_it_answers_what_runs_exits_with_0_and_leaves_nothing(short_path: Path) -> None:
    flags = ("--workers", "2", "--decode-workers", "2", "--spool-dir", str(short_path))
    with run_service(*flags) as service:
        family = family_of(service.process.pid)
        url = f"{service.client.base_url}/v1/classify?views=10&crops=3"
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            posts = [pool.submit(httpx.post, url, content=VIDEO, timeout=300) for _ in range(4)]
            wait_until(
                lambda: metric(service.client, "timesformer_requests_in_progress ") == 5
            )  # the fifth is the one that asks
            service.process.send_signal(signal.SIGTERM)
            assert [post.result().status_code for post in posts] == [200] * 4
        assert service.process.wait(120) == 0
        assert left_after_a_moment(family) == set()
        assert list(short_path.iterdir()) == []
        with pytest.raises(httpx.ConnectError):
            service.client.get("/health/live")


def test_what_is_not_done_after_the_grace_is_told_so_whichever_process_does_it(
    short_path: Path,
) -> None:
    flags = ("--workers", "2", "--decode-workers", "2", "--spool-dir", str(short_path), *PATIENT)
    with (
        run_service(*flags, "--shutdown-grace-s", "1") as service,
        stall(service, short_path) as own,
        stall(service, short_path, "/v1/timeline") as forwarded,
    ):
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(120) == 0
        for connection in (own, forwarded):
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert json.loads(body)["code"] == "not_ready"


def test_a_second_signal_ends_all_of_it_at_once(short_path: Path) -> None:
    flags = ("--workers", "2", "--decode-workers", "2", "--spool-dir", str(short_path), *PATIENT)
    with run_service(*flags, "--shutdown-grace-s", "600") as service, stall(service, short_path):
        family = family_of(service.process.pid)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any('"stopping"' in line for line in service.log))
        # As a terminal does it, to all that run in it.
        os.killpg(service.process.pid, signal.SIGINT)
        assert service.process.wait(120) == 128 + signal.SIGINT
        assert left_after_a_moment(family) == set()


def test_after_kill_9_nobody_is_left(short_path: Path) -> None:
    flags = ("--workers", "2", "--decode-workers", "2", "--spool-dir", str(short_path))
    with run_service(*flags) as service:
        family = family_of(service.process.pid)
        assert len(family) >= 4
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait(60)
        assert left_after_a_moment(family) == set()
    spool = Spool(short_path)  # as the next start has it
    assert list(short_path.iterdir()) == [spool.folder]
    spool.close()


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            [TIMESFORMER, "serve", "--workers", "2", "--device", "cpu", "--port", port],
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert run.returncode == 2
    assert f"TIMESFORMER_PORT: cannot listen on 127.0.0.1:{port}" in run.stderr
    assert "Traceback" not in run.stderr
