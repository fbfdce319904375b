"""Timelines of a service that is a process: its memory, and its end."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.service.long_video import worker_at, write_long_video

URL = "/v1/timeline"


@pytest.fixture(scope="module")
def half_an_hour(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("long")
    return write_long_video(folder / "a.mp4", 1800, rate=5, side=32).read_bytes()


def memory_of(pid: int) -> float:
    """Mebibytes that only this process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (anonymous,) = [line for line in lines if line.startswith("RssAnon")]
    return int(anonymous.split()[1]) / 1024


def test_memory_does_not_grow_with_the_length_of_the_video(
    start_service: Any, half_an_hour: bytes, tmp_path: Path
) -> None:
    """1687 windows of 98 KB each; held together they were 158 MiB."""
    with start_service("--spool-dir", str(tmp_path)) as service:
        ask = {"content": half_an_hour, "params": {"stride": "1.0666"}}
        with service.client.stream("POST", URL, **ask) as answer:
            lines = answer.iter_lines()
            for _ in range(100):
                next(lines)
            server, worker = service.process.pid, worker_at(tmp_path)
            before = memory_of(server), memory_of(worker)
            most, last = before, ""
            for count, line in enumerate(lines):
                last = line
                if count % 100 == 0 and Path(f"/proc/{worker}").exists():
                    most = max(most[0], memory_of(server)), max(most[1], memory_of(worker))
        summary = json.loads(last)
        assert summary["event"] == "summary"
        assert summary["windows"] > 1600
        assert most[0] - before[0] < 40
        assert most[1] - before[1] < 40


def test_when_the_service_stops_the_client_is_told(start_service: Any, half_an_hour: bytes) -> None:
    with start_service("--shutdown-grace-s", "1") as service:
        with service.client.stream("POST", URL, content=half_an_hour) as answer:
            lines = answer.iter_lines()
            next(lines)
            service.process.send_signal(signal.SIGTERM)
            *_, last = lines
        assert json.loads(last)["code"] == "not_ready"
        assert service.process.wait() == 0
