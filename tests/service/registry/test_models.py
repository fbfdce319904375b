"""Hot swap: another bundle takes over, nothing is lost or mixed, and a bad one changes nothing."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle.bundle import ACTIVE, Bundle, BundleStore
from export.bundle.manifest import ONNX_FLOAT32
from model.demo import STORE
from service.observability.metrics import Metrics
from service.registry.loading import max_batch
from service.settings import MIB, load_settings
from tests.export.conftest import publish_colours
from tests.service.conftest import tensor

SWAPS = 12
DEMO = BundleStore(STORE).open("demo")


def publish(store: BundleStore, graph: bytes | None = None) -> Bundle:
    """The demo bundle again, its labels marked with the version that it becomes."""
    version = len(store.versions("demo")) + 1
    with store.staging("demo") as staging:
        for file in DEMO.manifest.files:
            shutil.copy(DEMO.path / file, staging / file)
        if graph is not None:
            (staging / ONNX_FLOAT32).write_bytes(graph)
        labels = tuple(f"{version}: {label}" for label in DEMO.manifest.labels)
        return store.publish(staging, DEMO.manifest.model_copy(update={"labels": labels}))


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Two good versions, the first of them active."""
    store = BundleStore(tmp_path / "store")
    publish(store)
    publish(store)
    store.activate("demo", "1")
    return store


def wait_until(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def serving(client: httpx.Client) -> str:
    return str(client.get("/health/ready").json()["model"]["version"])


def metric(client: httpx.Client, line: str) -> float:
    found = [row for row in client.get("/metrics").text.splitlines() if row.startswith(line + " ")]
    return float(found[0].split()[-1]) if found else 0.0


def test_swaps_under_load_lose_nothing_and_each_answer_is_of_the_version_that_it_names(
    serve: Any, tmp_path: Path
) -> None:
    store = BundleStore(tmp_path / "store")
    divisors = {publish_colours(store, divisor=divisor).version: divisor for divisor in (64, 16)}
    store.activate("colours", "1")
    frames = np.full((3, 4, 16, 16, 3), 64, np.uint8)
    request = tensor(frames)
    with serve(store=store.root, watch_interval_s=0.02, spool_dir=tmp_path) as client:
        answers: list[httpx.Response] = []
        done = threading.Event()

        def load() -> None:
            with httpx.Client(base_url=client.base_url, timeout=120) as own:
                while not done.is_set():
                    answers.append(own.post("/v2/models/colours/infer", **request))

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(SWAPS):
                version = "2" if turn % 2 == 0 else "1"
                store.activate("colours", version)
                wait_until(lambda version=version: serving(client) == version)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert metric(client, 'timesformer_swaps_total{model="colours",result="done"}') == SWAPS
        assert metric(client, 'timesformer_swaps_total{model="colours",result="refused"}') == 0
        info = [row for row in client.get("/metrics").text.splitlines() if "model_info{" in row]
        assert len(info) == 1, "only the version that serves now is in the metrics"
    assert {answer.status_code for answer in answers} == {200}
    seen = set()
    for answer in (response.json() for response in answers):
        seen.add(answer["model_version"])
        (logits,) = (out["data"] for out in answer["outputs"] if out["name"] == "logits")
        expected = 64 / divisors[answer["model_version"]]
        assert logits == pytest.approx([expected] * 9)
    assert seen == {"1", "2"}


def fail_verification(version: Path) -> None:
    manifest = version / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"passed": true', '"passed": false'))


def damage(version: Path) -> None:
    graph = version / ONNX_FLOAT32
    graph.write_bytes(graph.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [fail_verification, damage])
def test_a_version_that_is_damaged_or_failed_verification_is_refused(
    serve: Any, store: BundleStore, tmp_path: Path, spoil: Any
) -> None:
    spoil(store.root / "demo" / "2")
    refused = 'timesformer_swaps_total{model="demo",result="refused"}'
    with serve(store=store.root, watch_interval_s=0.05, spool_dir=tmp_path) as client:
        (store.root / "demo" / ACTIVE).write_text('{"version": "2", "previous": ["1"]}')
        wait_until(lambda: metric(client, refused) == 1)
        (model,) = client.get("/health/ready").json()["models"]
        assert model == {"name": "demo", "version": "1", "refused": True}


def test_a_disk_that_fails_for_a_moment_does_not_end_the_watch(
    serve: Any, store: BundleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError(5, "Input/output error")] * 3)
    honest = BundleStore.history

    def history(self: BundleStore, name: str) -> list[str]:
        if error := next(failures, None):
            raise error
        return honest(self, name)

    with serve(store=store.root, watch_interval_s=0.05, spool_dir=tmp_path) as client:
        store.activate("demo", "2")
        monkeypatch.setattr(BundleStore, "history", history)
        wait_until(lambda: serving(client) == "2")


def test_a_version_that_cannot_run_is_refused_once_and_the_old_one_stays(
    serve: Any,
    store: BundleStore,
    video: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[str] = []
    history = BundleStore.history

    def counted(store: BundleStore, name: str) -> list[str]:
        looks.append(name)
        return history(store, name)

    monkeypatch.setattr(BundleStore, "history", counted)
    publish(store, graph=b"no graph at all")  # whole by its hashes, and of no use
    refused = 'timesformer_swaps_total{model="demo",result="refused"}'
    with serve(store=store.root, watch_interval_s=0.05, spool_dir=tmp_path) as client:
        store.activate("demo", "3")
        wait_until(lambda: metric(client, refused) == 1)
        before = len(looks)
        wait_until(lambda: len(looks) >= before + 3)
        assert metric(client, refused) == 1, "it should be tried once, not for ever"
        assert caplog.text.count("swap refused") == 1
        assert serving(client) == "1"
        assert metric(client, 'timesformer_active_bundle_refused{model="demo"}') == 1
        answer = client.post("/v1/classify", content=video.read_bytes()).json()
        assert answer["predictions"][0]["label"].startswith("1: ")
        store.activate("demo", "2")
        wait_until(lambda: serving(client) == "2")
        assert metric(client, 'timesformer_active_bundle_refused{model="demo"}') == 0


def test_a_damaged_pointer_changes_nothing(serve: Any, store: BundleStore, tmp_path: Path) -> None:
    refused = 'timesformer_swaps_total{model="demo",result="refused"}'
    with serve(store=store.root, watch_interval_s=0.05, spool_dir=tmp_path) as client:
        for pointer in ("{", {"version": "9", "previous": []}, {"version": 1}):
            before = metric(client, refused)
            text = pointer if isinstance(pointer, str) else json.dumps(pointer)
            (store.root / "demo" / ACTIVE).write_text(text)
            # Half a file may be met before the whole.
            wait_until(lambda before=before: metric(client, refused) > before)
            assert serving(client) == "1"
        (store.root / "demo" / ACTIVE).unlink()
        store.activate("demo", "2")
        wait_until(lambda: serving(client) == "2")


@pytest.mark.parametrize(("clips", "warned"), [(10, False), (11, True)])
def test_more_clips_than_a_process_holds_are_warned_of(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, clips: int, warned: bool
) -> None:
    """A clip of the demo model takes 98,304 bytes."""
    with serve(max_clips_per_request=clips, max_tensor_bytes=MIB, spool_dir=tmp_path):
        pass
    assert ("TIMESFORMER_MAX_TENSOR_BYTES" in caplog.text) == warned


def test_with_the_watch_off_nothing_changes(serve: Any, store: BundleStore, tmp_path: Path) -> None:
    with serve(store=store.root, watch_interval_s=0, spool_dir=tmp_path) as client:
        store.activate("demo", "2")
        time.sleep(0.5)
        assert serving(client) == "1"


@pytest.mark.parametrize(("device", "clips"), [("cpu", 2), ("cuda", 16)])
def test_the_largest_batch_is_the_devices_unless_it_is_set(device: str, clips: int) -> None:
    runtime = SimpleNamespace(device=device)
    assert max_batch(load_settings(), runtime) == clips
    assert max_batch(load_settings(max_batch_clips=5), runtime) == 5


def test_metrics_of_two_apps_are_apart() -> None:
    one, other = Metrics(), Metrics()
    one.swaps.labels("demo", "done").inc()
    assert b'timesformer_swaps_total{model="demo",result="done"} 1.0' in one.render()
    assert b'timesformer_swaps_total{model="demo"' not in other.render()
