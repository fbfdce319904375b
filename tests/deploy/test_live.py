"""A real Prometheus with our rules beside a real service: it sees the metrics, and is alarmed."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from export.bundle.bundle import BundleStore
from model.demo import SAMPLE_CLIP
from tests.deploy.conftest import DEPLOY, find
from tests.deploy.test_observability import DASHBOARDS, expressions
from tests.e2e.conftest import run_service
from tests.images.check import wait_for
from tests.images.compose import Prometheus
from tests.processes import free_port
from tests.service.registry.test_models import publish

pytestmark = pytest.mark.slow


def configuration(folder: Path, target: str) -> Path:
    """Our rules, with one target and quicker than in production."""
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    job = {"job_name": "timesformer", "static_configs": [{"targets": [target]}]}
    times = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    file = folder / "prometheus.yml"
    file.write_text(
        yaml.safe_dump({"global": times, "rule_files": ["rules.yml"], "scrape_configs": [job]})
    )
    return file


def test_prometheus_reads_a_running_service_and_fires_when_it_is_broken(tmp_path: Path) -> None:
    prometheus = find("prometheus")
    store = BundleStore(tmp_path / "store")
    publish(store)
    publish(store, graph=b"no graph at all")
    store.activate("demo", "1")
    port = free_port()
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    flags = ("--store", str(store.root), "--jobs-dir", str(jobs), "--watch-interval-s", "0.2")
    with run_service(*flags) as service:
        target = service.client.base_url.netloc.decode()
        with subprocess.Popen(
            [
                prometheus,
                f"--config.file={configuration(tmp_path, target)}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as asked:
                    _watch(Prometheus(asked), service.client, store)
            finally:
                process.terminate()
                process.wait()


def _watch(prometheus: Prometheus, client: httpx.Client, store: BundleStore) -> None:
    query, firing = prometheus.query, prometheus.firing
    wait_for(lambda: query("timesformer_ready == 1"), "Prometheus saw no service", 1800)
    for _ in range(3):
        client.post("/v1/classify", content=SAMPLE_CLIP.read_bytes()).raise_for_status()
        client.post("/v1/jobs?kind=classify", content=SAMPLE_CLIP.read_bytes()).raise_for_status()
        time.sleep(1.1)
    wait_for(lambda: query("rate(timesformer_job_seconds_count[1m]) >= 0"), "no job was done", 1800)
    wait_for(lambda: query("job:timesformer_requests:rate5m > 0"), "no recording rule", 1800)
    assert not firing()
    for dashboard in DASHBOARDS:
        for expression in expressions(dashboard):
            filled = expression.replace("$job", "timesformer").replace("$instance", ".*")
            found = query(filled)
            # Nothing is refused, nothing fires and no URL is read, so that these show nothing.
            empty = any(metric in filled for metric in ("ALERTS", "rejected", "source_seconds"))
            assert found or empty, filled
    store.activate("demo", "2")
    wait_for(lambda: "TimeSformerSwapRefused" in firing(), "no alert", 1800)
    assert firing() == {"TimeSformerSwapRefused"}
    store.activate("demo", "1")
    assert client.get("/health/ready").json()["model"]["version"] == "1"
