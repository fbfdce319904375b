"""Several models by name in one service: chosen by requests, each on its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest

from export.bundle.bundle import ACTIVE, BundleError, BundleStore
from export.bundle.manifest import ONNX_FLOAT32
from model.video import load_clips
from service.observability.metrics import Metrics
from service.registry.models import Models
from service.settings import SettingsError, load_settings
from tests.export.conftest import colour_config, publish_colours, write_video
from tests.service.conftest import Serve, send, tensor
from tests.service.registry.test_models import metric, wait_until

URL = "/v1/classify"


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "red.mp4", "red")


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """`plain` names the colour of a video, `inverse` the one that it has least of."""
    store = BundleStore(tmp_path / "store")
    for name, divisor in {"plain": 64, "inverse": -64}.items():
        store.activate(name, publish_colours(store, name, divisor=divisor).version)
    return store


def best(answer: httpx.Response) -> tuple[str, str]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["model"]["name"], body["predictions"][0]["label"]


def spoil(store: BundleStore, name: str, version: str = "1") -> None:
    """Changes a published file, which its hash tells."""
    (store.root / name / version / ONNX_FLOAT32).write_bytes(b"spoilt")


def test_a_request_chooses_in_the_query_in_the_form_or_by_the_path(
    serve: Serve, store: BundleStore, red: Path
) -> None:
    content = red.read_bytes()
    frames = load_clips(red, colour_config().preprocessing).frames
    with serve(store=store.root, model="plain, inverse", watch_interval_s=0) as client:
        assert best(client.post(URL, content=content)) == ("plain", "red")
        chosen = client.post(URL, params={"model": "inverse"}, content=content)
        assert best(chosen)[0] == "inverse"
        assert best(chosen)[1] != "red"
        form = client.post(URL, files={"file": content}, data={"model": "inverse"})
        assert best(form) == best(chosen)
        embedded = client.post("/v1/embed?model=inverse", content=content).json()
        assert embedded["model"]["name"] == "inverse"
        for name, sign in {"plain": 1, "inverse": -1}.items():
            answer = client.post(f"/v2/models/{name}/infer", **tensor(frames)).json()
            assert answer["model_name"] == name
            logits = np.array(answer["outputs"][0]["data"])
            np.testing.assert_allclose(logits, sign * frames.mean((0, 1, 2, 3)) / 64, atol=1e-3)


def test_all_are_listed_the_first_named_is_the_default_and_metrics_tell_them_apart(
    serve: Serve, store: BundleStore, red: Path
) -> None:
    with serve(store=store.root, model="inverse,plain", watch_interval_s=0) as client:
        names = [model["name"] for model in client.get("/v1/models").json()["models"]]
        assert names == ["inverse", "plain"]
        ready = client.get("/health/ready").json()
        assert ready["model"]["name"] == "inverse"
        assert [model["version"] for model in ready["models"]] == ["1", "1"]
        assert client.get("/health/ready?model=plain").json()["model"]["name"] == "plain"
        client.post(URL, params={"model": "plain"}, content=red.read_bytes()).raise_for_status()
        assert metric(client, 'timesformer_batch_clips_count{model="plain"}') == 1
        assert metric(client, 'timesformer_batch_clips_count{model="inverse"}') == 0
        assert metric(client, 'timesformer_stage_seconds_count{model="plain",stage="total"}') == 1


def test_a_name_that_nobody_has_is_a_404_with_those_that_are_before_anything_is_uploaded(
    serve: Serve, store: BundleStore
) -> None:
    with serve(store=store.root, model="plain,inverse", watch_interval_s=0) as client:
        with send(client, "/v1/classify?model=other", length=99999) as line:
            answer = line.recv(65536).decode()
        assert answer.startswith("HTTP/1.1 404")
        form = client.post(URL, files={"file": b"x"}, data={"model": "other"})
        assert form.status_code == 404
        assert form.headers["content-type"] == "application/problem+json"
        assert form.json()["code"] == "model_not_found"
        assert "'plain', 'inverse'" in form.json()["detail"]
        assert 'model="other"' not in client.get("/metrics").text


def test_one_that_cannot_be_loaded_does_not_keep_the_others_from_serving(
    serve: Serve, store: BundleStore, red: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(store, "plain")
    content = red.read_bytes()
    with serve(store=store.root, model="plain,inverse", watch_interval_s=0.05) as client:
        answer = client.post(URL, content=content)
        assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
        assert best(client.post(URL, params={"model": "inverse"}, content=content))[0] == "inverse"
        ready = client.get("/health/ready").json()
        assert ready["model"]["name"] == "inverse"
        assert ready["models"][0] == {"name": "plain", "version": None, "refused": True}
        assert client.get("/health/ready?model=plain").status_code == 503
        assert client.get("/v2/models/plain/ready").status_code == 503
        assert metric(client, 'timesformer_active_bundle_refused{model="plain"}') == 1
        assert metric(client, 'timesformer_active_bundle_refused{model="inverse"}') == 0
        assert caplog.text.count("model not loaded") == 1
        store.activate("plain", publish_colours(store, "plain").version)
        wait_until(lambda: client.get("/health/ready?model=plain").status_code == 200)
        assert best(client.post(URL, content=content)) == ("plain", "red")
        assert metric(client, 'timesformer_active_bundle_refused{model="plain"}') == 0


def test_a_default_whose_engine_fails_leaves_it_ready_for_the_others_and_says_so(
    serve: Serve, store: BundleStore, red: Path
) -> None:
    breaks_on_light = 1e-38
    store.activate("plain", publish_colours(store, "plain", divisor=breaks_on_light).version)
    content = red.read_bytes()
    with serve(store=store.root, model="plain,inverse", watch_interval_s=0) as client:
        assert client.get("/health/ready").json()["model"]["name"] == "plain"
        for _ in range(3):
            assert client.post(URL, content=content).status_code == 500
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["model"]["name"]) == (200, "inverse")
        assert ready.json()["engines"] == [{"device": "cpu", "healthy": True}]
        broken = client.get("/health/ready?model=plain")
        assert (broken.status_code, broken.json()["code"]) == (503, "not_ready")
        assert client.get("/health/ready?model=inverse").status_code == 200
        assert metric(client, 'timesformer_engines_healthy{model="plain"}') == 0
        assert metric(client, 'timesformer_engines_healthy{model="inverse"}') == 1
        assert best(client.post(URL, params={"model": "inverse"}, content=content))[0] == "inverse"


def test_a_swap_of_one_that_is_refused_leaves_the_others_to_swap(
    serve: Serve, store: BundleStore
) -> None:
    for name in ("plain", "inverse"):
        publish_colours(store, name)
        store.activate(name, "1")
    with serve(store=store.root, model="*", watch_interval_s=0.05) as client:
        (store.root / "inverse" / ACTIVE).write_text("{")
        wait_until(
            lambda: metric(client, 'timesformer_active_bundle_refused{model="inverse"}') == 1
        )
        store.activate("plain", "2")
        url = "/health/ready?model="
        wait_until(lambda: client.get(f"{url}plain").json()["model"]["version"] == "2")
        assert client.get(f"{url}inverse").json()["model"]["version"] == "1"


def test_all_of_the_store_is_also_what_comes_into_it_later(
    serve: Serve, store: BundleStore, red: Path
) -> None:
    publish_colours(store, "asleep")  # no version of it is active
    with serve(store=store.root, model="*", watch_interval_s=0.05) as client:
        names = [model["name"] for model in client.get("/v1/models").json()["models"]]
        assert names == ["inverse", "plain"]
        store.activate("asleep", "1")
        wait_until(lambda: client.get("/health/ready?model=asleep").status_code == 200)
        answer = client.post(URL, params={"model": "asleep"}, content=red.read_bytes())
        assert best(answer) == ("asleep", "red")


def test_a_disk_that_fails_for_a_moment_does_not_end_the_watch_for_new_names(
    serve: Serve, store: BundleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError(5, "Input/output error")] * 3)
    honest = BundleStore.names

    def names(store: BundleStore) -> list[str]:
        if error := next(failures, None):
            raise error
        return honest(store)

    with serve(store=store.root, model="*", watch_interval_s=0.05) as client:
        monkeypatch.setattr(BundleStore, "names", names)
        wait_until(lambda: next(failures, None) is None)
        store.activate("third", publish_colours(store, "third").version)
        wait_until(lambda: len(client.get("/v1/models").json()["models"]) == 3)


def test_if_none_can_be_served_it_does_not_start_and_says_why_of_each(store: BundleStore) -> None:
    spoil(store, "plain")
    spoil(store, "inverse")
    settings = load_settings(store=store.root, model="*", device="cpu")

    async def start() -> None:
        models = Models(settings, Metrics())
        try:
            await models.start()
        finally:
            await models.close()

    with pytest.raises(BundleError, match="none of the models") as error:
        asyncio.run(start())
    assert "plain: " in str(error.value)
    assert "inverse: " in str(error.value)


def test_which_models_are_meant_must_be_clear(store: BundleStore) -> None:
    with pytest.raises(SettingsError, match=r"TIMESFORMER_MODEL: .*between the commas"):
        load_settings(model="a,,b")
    with pytest.raises(BundleError, match="holds inverse, plain: set TIMESFORMER_MODEL"):
        asyncio.run(Models(load_settings(store=store.root), Metrics()).start())
