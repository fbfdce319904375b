"""Brings docker-compose.yml up for real, and breaks what it runs to see that it is noticed.

    make test-compose COMPOSE="docker compose" BUILD="docker build"
    make test-compose COMPOSE=podman-compose BUILD="buildah build ..." DEBIAN_PROMETHEUS=yes

Prometheus finds the service by name, with the intervals and rules that are shipped; the `refresh`
profile trains on, and the service that runs takes the result over; a damaged version and a stopped
service each set their alert off. Grafana is not started. Minutes: alerts wait before they fire.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from export.bundle.bundle import BundleStore
from export.bundle.manifest import ONNX_FLOAT32
from model.demo import SAMPLE_CLIP, STORE
from tests.images.check import ROOT, open_to_all, output, refresh, wait_for

SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
STARTED = ("timesformer", "prometheus")


def build(command: list[str], debian_prometheus: bool) -> None:
    """The images under the names that docker-compose.yml gives them."""
    for name in ("timesformer", "refresh"):
        service = SERVICES[name]
        output(*command, "--target", service["build"]["target"], "--tag", service["image"], ".")
    if debian_prometheus:
        image = f"docker.io/{SERVICES['prometheus']['image']}"
        file = "tests/images/prometheus.Dockerfile"
        output(*command, "--file", file, "--tag", image, "build/tools/bin")


@contextlib.contextmanager
def up(compose: list[str]) -> Iterator[None]:
    """The service and Prometheus run; their volumes are gone afterwards."""
    try:
        output(*compose, "up", "--detach", "--no-build", *STARTED)
        yield
    finally:
        subprocess.run([*compose, "down", "--volumes"], cwd=ROOT, capture_output=True, check=False)


class Prometheus:
    """Reads series and alerts of a Prometheus; the client's base URL is the server."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives; none while it starts."""
        try:
            answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        except (httpx.TransportError, json.JSONDecodeError):
            return []  # it starts, or reads its files
        assert answer["status"] == "success", (expression, answer)
        return list(answer["data"]["result"])

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        series = self.query('ALERTS{alertstate="firing"}')
        return {item["metric"]["alertname"] for item in series}


def timed(found: Callable[[], Any], what: str, seconds: float) -> Any:
    """Waits, and prints how long it took."""
    started = time.monotonic()
    result = wait_for(found, f"not in {seconds:.0f} s: {what}", seconds)
    print(f"compose: {what} after {time.monotonic() - started:.0f} s", flush=True)
    return result


def check(compose: list[str], store: BundleStore, client: httpx.Client, seen: Prometheus) -> None:
    """The service is seen, refreshed, and missed."""
    timed(lambda: answers(client), "service ready", 120)
    (ready,) = timed(lambda: seen.query("timesformer_ready == 1"), "scraped by its name", 120)
    assert ready["metric"]["job"] == "timesformer", ready
    answer = client.post("/v1/classify", content=SAMPLE_CLIP.read_bytes()).json()
    assert answer["predictions"][0]["label"] == "turning clockwise", answer
    route = 'sum(timesformer_requests_total{route="/v1/classify",status="200"})'
    timed(lambda: values(seen.query(route)) == [1.0], "a request counted", 120)
    layers = seen.query("timesformer_decode_sandbox == 1")
    print(f"compose: sandbox {sorted(item['metric']['layer'] for item in layers)}", flush=True)
    assert not seen.firing()

    refresh([*compose, "--profile", "refresh", "run", "--rm", "refresh"], client)

    version = damaged(store)
    timed(lambda: "TimeSformerSwapRefused" in seen.firing(), "a damaged version alarmed", 180)
    assert seen.firing() == {"TimeSformerSwapRefused"}
    assert client.get("/health/ready").json()["model"]["version"] != version

    output(*compose, "stop", "timesformer")
    timed(lambda: "TimeSformerAbsent" in seen.firing(), "a stopped service alarmed", 360)


def answers(client: httpx.Client) -> bool:
    """Whether the service is ready."""
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health/ready").status_code == 200
    return False


def values(series: list[dict[str, Any]]) -> list[float]:
    """The numbers of series."""
    return [float(item["value"][1]) for item in series]


def damaged(store: BundleStore) -> str:
    """Activates a version whose graph breaks on the disk afterwards; returns the version."""
    with store.staging("demo") as staging:
        good = store.open("demo", "1")
        for file in good.manifest.files:
            shutil.copy(good.file(file), staging / file)
        (staging / ONNX_FLOAT32).write_bytes(b"no graph at all")
        bundle = store.publish(staging, good.manifest)
    open_to_all(store.root)
    store.activate("demo", bundle.version)
    open_to_all(store.root)
    return bundle.version


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring docker-compose.yml up, and break it.")
    parser.add_argument("--compose", default="docker compose", help="Or podman-compose.")
    parser.add_argument("--build", default="docker build", help="What builds, with its options.")
    parser.add_argument(
        "--debian-prometheus",
        action="store_true",
        help="Where no registry is reached: build Prometheus of `make deploy-tools` into an image.",
    )
    parser.add_argument("--port", type=int, default=18000)
    options = parser.parse_args()
    build(shlex.split(options.build), options.debian_prometheus)
    compose = [*shlex.split(options.compose), "--project-name", "timesformer-check"]
    with tempfile.TemporaryDirectory() as name:
        store, data = Path(name, "bundles"), Path(name, "data")
        shutil.copytree(STORE, store)
        demo_set = ("data", "demo", data, "--videos", "48", "--held-out", "24")
        output(Path(sys.executable).with_name("timesformer"), *demo_set)
        open_to_all(Path(name))
        os.environ |= {
            "PORT": str(options.port),
            "PROMETHEUS_PORT": str(options.port + 1),
            "TIMESFORMER_STORE": "/bundles",
            "TIMESFORMER_STORE_DIR": str(store),
            "DATA_DIR": str(data),
        }
        with (
            up(compose),
            httpx.Client(base_url=f"http://127.0.0.1:{options.port}", timeout=60) as client,
            httpx.Client(base_url=f"http://127.0.0.1:{options.port + 1}", timeout=60) as asked,
        ):
            check(compose, BundleStore(store), client, Prometheus(asked))


if __name__ == "__main__":
    main()
