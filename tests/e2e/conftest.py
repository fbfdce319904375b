"""The real thing: `timesformer serve` as a process of its own, found by what it prints.

Nothing here has a limit of its own: pytest's limit per test ends a hang.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

TIMESFORMER = Path(sys.executable).with_name("timesformer")


class Service(NamedTuple):
    """A service that is ready."""

    process: subprocess.Popen[str]
    client: httpx.Client
    log: list[str]


StartService = Callable[..., AbstractContextManager[Service]]


@contextlib.contextmanager
def run_service(*flags: str, command: tuple[str, ...] = (str(TIMESFORMER),)) -> Iterator[Service]:
    """Runs `timesformer serve` on a free port; it is ready inside the block.

    Args:
        command: what runs in the place of `timesformer`.
    """
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("TIMESFORMER_")
    }
    with subprocess.Popen(
        [*command, "serve", "--port", "0", "--device", "cpu", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        log: list[str] = []
        url = _wait_until_ready(process, log)
        # Reads on, so that a full pipe never stops the service.
        reader = threading.Thread(target=lambda: log.extend(process.stdout or []), daemon=True)
        reader.start()
        try:
            with httpx.Client(base_url=url, timeout=3600) as client:
                yield Service(process, client, log)
        finally:
            process.terminate()
            process.wait()
            reader.join()


def _wait_until_ready(process: subprocess.Popen[str], log: list[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        log.append(line)
        if ready := re.search(r"^ready at (\S+)", line):
            return ready[1]
    raise AssertionError("the service did not start:\n" + "".join(log))


@pytest.fixture(scope="session")
def start_service() -> StartService:
    """Starts `timesformer serve` with more flags; it is ready inside the block."""
    return run_service


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """One service of the bundled demo model with default settings."""
    with run_service() as service:
        yield service
