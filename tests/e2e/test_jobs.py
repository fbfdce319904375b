"""Jobs of a service that is killed and started again: none is lost, none is done twice."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.jobs.store import JobStore
from tests.service.long_video import write_long_video
from tests.service.web_server import Handler, web_server

URL = "/v1/jobs"


@pytest.fixture(scope="module")
def minutes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("long")
    return write_long_video(folder / "a.mp4", 120, rate=5, side=32).read_bytes()


def wait_until(client: httpx.Client, enough: Any) -> dict[str, str]:
    """Returns the states once they are `enough`."""
    while True:
        states = {job["id"]: job["state"] for job in client.get(URL).json()["jobs"]}
        if enough(states):
            return states
        time.sleep(0.05)


def same_windows(result: dict[str, Any], other: dict[str, Any]) -> bool:
    """All windows once and in order, with the scores of other batches within what these add up
    otherwise."""

    def seen(of: dict[str, Any]) -> list[float]:
        return [
            number
            for window in of["windows"]
            for number in (
                *(window["number"], window["start_s"], window["end_s"]),
                window["predictions"][0]["score"],
            )
        ]

    return seen(result) == pytest.approx(seen(other), abs=1e-4)


def test_stopped_once_and_killed_twice_with_jobs_running_none_is_lost_or_done_twice(
    start_service: Any, minutes: bytes, tmp_path: Path
) -> None:
    ends, calls = (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL), list[str]()

    def answer(handler: Handler) -> None:
        calls.append(handler.path)
        handler.say(200)

    secret = tmp_path / "secret"
    secret.write_bytes(b"sixteen bytes and more")
    jobs_dir = tmp_path / "jobs"
    with web_server(answer) as host:
        flags = [
            *("--jobs-dir", str(jobs_dir), "--job-workers", "2"),
            *("--webhook-hosts", host, "--webhook-http", "true", "--webhook-private", "true"),
            *("--webhook-secret-file", str(secret)),
        ]
        accepted: list[str] = []
        for turn, end in enumerate(ends):
            with start_service(*flags) as service:
                for number in range(3):
                    name = f"{turn}-{number}"
                    job = service.client.post(
                        URL,
                        params={"kind": "timeline", "webhook": f"http://{host}/{name}"},
                        content=minutes,
                        headers={"Idempotency-Key": name},
                    )
                    assert job.status_code == 202
                    accepted.append(job.json()["id"])
                wait_until(service.client, lambda found: "running" in found.values())
                service.process.send_signal(end)
                assert service.process.wait() == (0 if end == signal.SIGTERM else -end)
            if end == signal.SIGTERM:
                left = JobStore(jobs_dir / "jobs.sqlite").page(None, None, 9)
                assert {(job.state, job.attempts) for job in left} <= {("queued", 0), ("done", 1)}
        with start_service(*flags) as service:
            again = service.client.post(
                URL,
                params={"kind": "timeline"},
                content=minutes,
                headers={"Idempotency-Key": "0-0"},
            )
            assert again.json()["id"] == accepted[0]
            found = wait_until(service.client, lambda found: set(found.values()) == {"done"})
            assert set(found) == set(accepted)
            results = [service.client.get(f"{URL}/{job}/result").json() for job in accepted]
            assert all(same_windows(result, results[0]) for result in results)
            while len(set(calls)) < len(accepted):
                time.sleep(0.05)
    # A call that a kill parts from its note is made again, as docs and code say.
    assert len(set(calls)) == len(accepted)
    assert max(Counter(calls).values()) <= 1 + ends.count(signal.SIGKILL)
    assert list((jobs_dir / "videos").iterdir()) == []
    assert {path.name for path in (jobs_dir / "results").iterdir()} == set(accepted)
