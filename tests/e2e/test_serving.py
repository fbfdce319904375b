"""The service as a process: what it prints, how it stops, what it does when it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.demo import SAMPLE_CLIP
from service.api.auth import ApiKey, new_key, write_keys
from tests.e2e.conftest import TIMESFORMER
from tests.processes import descendants_of


def wait_for_the_end_of(pids: set[int]) -> None:
    """Returns once none of the processes is left."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)


PATIENT = ("--upload-timeout-s", "3600", "--min-upload-rate", "0")
LAST = 96  # bytes that a stalled client keeps back


def stall(service: Any, spool: Path, content: bytes = bytes(99)) -> socket.socket:
    """A client that sends all but the last bytes of an upload; back once the service has begun
    too."""
    known = set(spool.rglob("*"))
    sender = socket.create_connection((service.client.base_url.host, service.client.base_url.port))
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    sender.sendall(head.encode() + content[:-LAST])
    while not any(found.is_file() for found in {*spool.rglob("*")} - known):
        time.sleep(0.01)
    return sender


def read_all(connection: socket.socket) -> bytes:
    """What the other side sent until it hung up."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(65536):
            received += block
    return received


def test_a_stalled_upload_does_not_hold_up_the_stop_beyond_the_grace(
    start_service: Any, tmp_path: Path
) -> None:
    flags = ("--shutdown-grace-s", "1", *PATIENT, "--spool-dir", str(tmp_path))
    with start_service(*flags) as service, stall(service, tmp_path) as sender:
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait() == 0
        head, _, body = read_all(sender).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: " in head
        assert json.loads(body)["code"] == "not_ready"
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_on_sigterm_it_finishes_what_runs_and_exits_with_0(
    start_service: Any, tmp_path: Path
) -> None:
    content = SAMPLE_CLIP.read_bytes()
    flags = ("--shutdown-grace-s", "3600", *PATIENT, "--spool-dir", str(tmp_path))
    with (
        start_service(*flags) as service,
        stall(service, tmp_path, content) as first,
        stall(service, tmp_path, content) as second,
    ):
        processes = descendants_of(service.process.pid)
        service.process.send_signal(signal.SIGTERM)
        while not any('"stopping"' in line for line in service.log):
            time.sleep(0.01)
        for sender in (first, second):
            sender.sendall(content[-LAST:])
            assert read_all(sender).startswith(b"HTTP/1.1 200 ")
        assert service.process.wait() == 0
        wait_for_the_end_of(processes)


def test_after_sigterm_it_serves_on_for_the_delay_and_a_second_signal_ends_it_at_once(
    start_service: Any, tmp_path: Path
) -> None:
    delays = ("--shutdown-delay-s", "600", "--shutdown-grace-s", "3600")
    flags = (*delays, *PATIENT, "--spool-dir", str(tmp_path))
    with start_service(*flags) as service, stall(service, tmp_path):
        client, processes = service.client, descendants_of(service.process.pid)
        assert client.get("/health/ready").status_code == 200
        service.process.send_signal(signal.SIGTERM)
        while client.get("/health/ready").status_code != 503:
            time.sleep(0.01)
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        assert "timesformer_ready 0.0" in client.get("/metrics").text
        answer = client.post("/v1/classify", content=SAMPLE_CLIP.read_bytes())
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait() == 128 + signal.SIGINT
        wait_for_the_end_of(processes)


def test_when_the_delay_is_over_it_refuses_connections_and_exits_with_0(
    start_service: Any,
) -> None:
    with start_service("--shutdown-delay-s", "1") as service:
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait() == 0
        with pytest.raises(httpx.ConnectError):
            service.client.get("/health/live")


ENGINE_THAT_HANGS = """
import threading
from export.runtime.onnxruntime import OnnxRuntime
from service.__main__ import main

real = OnnxRuntime.run

def run(engine, frames):
    if not frames.any():  # the warm-up's clips are black
        return real(engine, frames)
    print("the engine hangs", flush=True)
    threading.Event().wait()

OnnxRuntime.run = run
if __name__ == "__main__":
    main()
"""


@contextlib.contextmanager
def hanging_service(start_service: Any, path: Path, *flags: str) -> Iterator[Any]:
    """A service whose engine never comes back from its first batch, which it has begun."""
    path.write_text(ENGINE_THAT_HANGS)
    with start_service(*flags, command=(sys.executable, str(path))) as service:

        def post() -> None:
            with contextlib.suppress(httpx.HTTPError):
                service.client.post("/v1/classify", content=SAMPLE_CLIP.read_bytes())

        client = threading.Thread(target=post)
        client.start()
        while not any("the engine hangs" in line for line in service.log):
            assert client.is_alive()
            time.sleep(0.01)
        yield service
        client.join()


def test_an_engine_that_hangs_does_not_hold_up_the_stop_for_ever(
    start_service: Any, tmp_path: Path
) -> None:
    flags = ("--shutdown-grace-s", "1")
    with hanging_service(start_service, tmp_path / "serve.py", *flags) as service:
        processes = descendants_of(service.process.pid)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait() == 1
        wait_for_the_end_of(processes)
    assert any("an engine does not end and is left" in line for line in service.log)


def test_a_second_signal_also_ends_a_stop_that_waits_for_the_engine(
    start_service: Any, tmp_path: Path
) -> None:
    flags = ("--shutdown-grace-s", "600")
    with hanging_service(start_service, tmp_path / "serve.py", *flags) as service:
        service.process.send_signal(signal.SIGTERM)
        while not any('"stopping"' in line for line in service.log):
            time.sleep(0.01)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait() == 128 + signal.SIGTERM


def test_it_says_what_its_start_took(service: Any) -> None:
    (line,) = [line for line in service.log if line.startswith("ready at ")]
    total = float(line.split(" after ")[1].split()[0])
    metrics = service.client.get("/metrics").text
    found = dict(re.findall(r'timesformer_start_seconds\{stage="(\w+)"\} (\S+)', metrics))
    assert set(found) == {"imports", "store", "models", "decoders", "total"}
    assert float(found["total"]) == pytest.approx(total, abs=0.06)
    assert 0 < float(found["imports"]) < total
    assert 0 < max(float(found["models"]), float(found["decoders"])) < total


def test_administration_and_metrics_may_have_a_port_of_their_own(
    start_service: Any, tmp_path: Path
) -> None:
    key, digest = new_key()
    write_keys(tmp_path / "keys", (ApiKey(name="root", sha256=digest, scopes=("admin",)),))
    headers = {"Authorization": f"Bearer {key}"}
    flags = ("--admin-port", "0", "--api-keys-file", str(tmp_path / "keys"))
    with start_service(*flags) as service, contextlib.ExitStack() as stack:
        (line,) = [line for line in service.log if line.startswith("administration and metrics at")]
        admin = stack.enter_context(httpx.Client(base_url=line.split()[-1], timeout=3600))
        for path in ("/metrics", "/v1/admin/models"):
            assert service.client.get(path, headers=headers).status_code == 404
        assert "timesformer_ready 1.0" in admin.get("/metrics").text
        assert admin.get("/health/ready").status_code == 200
        assert admin.get("/v1/admin/models").status_code == 401
        (model,) = admin.get("/v1/admin/models", headers=headers).json()["models"]
        assert model["serving"] == "1"
        assert admin.post("/v1/classify", headers=headers, content=b"x").status_code == 404
        content = SAMPLE_CLIP.read_bytes()
        answer = service.client.post("/v1/classify", content=content, headers=headers)
        assert answer.status_code == 200
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait() == 0


def test_after_kill_9_no_decoder_stays_behind_and_the_next_start_clears_the_spool(
    start_service: Any, tmp_path: Path
) -> None:
    with start_service("--spool-dir", str(tmp_path)) as service:
        processes = descendants_of(service.process.pid)
        assert len(processes) >= 3
        with stall(service, tmp_path):
            os.kill(service.process.pid, signal.SIGKILL)
            service.process.wait()
        wait_for_the_end_of(processes)
    (left,) = tmp_path.iterdir()
    with start_service("--spool-dir", str(tmp_path)):
        (folder,) = tmp_path.iterdir()
        assert folder.name != left.name
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--api-keys-file", "/nowhere"], 2, "TIMESFORMER_API_KEYS_FILE"),
        (["--model", "nobody"], 1, "nobody"),
        (["--device", "cuda"], 1, "CUDAExecutionProvider"),
    ],
)
def test_what_keeps_it_from_starting_is_said_without_a_traceback(
    flags: list[str], status: int, message: str
) -> None:
    run = subprocess.run(
        [TIMESFORMER, "serve", "--port", "0", *flags], capture_output=True, text=True
    )
    assert run.returncode == status
    assert message in run.stderr
    assert "Traceback" not in run.stderr
