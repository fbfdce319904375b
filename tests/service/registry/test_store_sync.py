"""A service whose bundles lie in an object store: it follows, and outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

from export.bundle.bundle import BundleError, BundleStore
from export.bundle.remote_store import RemoteStore
from service.cli.main import cli
from service.server.app import create_app, running
from service.settings import load_settings
from tests.export.conftest import publish_colours, write_video
from tests.service.api.test_auth import bearer, write
from tests.service.conftest import Serve
from tests.service.registry.test_models import metric, wait_until

Outage = Callable[[], contextlib.AbstractContextManager[None]]
BROKEN = "no route to the store"


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Where bundles are made; two versions."""
    store = BundleStore(tmp_path / "store")
    for _ in range(2):
        publish_colours(store)
    return store


@pytest.fixture
def remote(store: BundleStore) -> RemoteStore:
    """Holds version 1, active, and version 2."""
    remote = RemoteStore(f"memory://{uuid.uuid4().hex}/bundles")
    for version in ("1", "2"):
        remote.push(store.open("colours", version))
    remote.activate("colours", "1")
    return remote


@pytest.fixture
def red(tmp_path: Path) -> bytes:
    return write_video(tmp_path / "red.mp4").read_bytes()


@pytest.fixture
def outage(
    monkeypatch: pytest.MonkeyPatch,
) -> Outage:
    """Inside the block the store does not answer."""

    def dead(*_: object, **__: object) -> None:
        raise OSError(BROKEN)

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "cat_file", dead)
            patch.setattr(MemoryFileSystem, "ls", dead)
            yield

    return block


def answer(client: httpx.Client, video: bytes) -> dict:
    response = client.post("/v1/classify", content=video)
    assert response.status_code == 200, response.text
    return response.json()


def behind(client: httpx.Client) -> float:
    return metric(client, "timesformer_store_behind")


def test_what_serves_goes_on_serving_through_an_outage(
    serve: Serve,
    remote: RemoteStore,
    tmp_path: Path,
    red: bytes,
    outage: Outage,
) -> None:
    cache = tmp_path / "cache"
    with serve(store_url=remote.url, store=cache, watch_interval_s=0.1) as client:
        assert behind(client) == 0
        assert BundleStore(cache).versions("colours") == ["1"]  # only what serves is fetched
        with outage():
            wait_until(lambda: behind(client) == 1)
            assert answer(client, red)["predictions"][0]["label"] == "red"
            assert client.get("/health/ready").status_code == 200
        remote.activate("colours", "2")
        wait_until(lambda: answer(client, red)["model"]["version"] == "2")
        wait_until(lambda: behind(client) == 0)


def test_a_start_without_the_store_serves_what_the_node_has_and_fails_if_that_is_nothing(
    serve: Serve,
    remote: RemoteStore,
    tmp_path: Path,
    red: bytes,
    outage: Outage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = BundleStore(tmp_path / "cache")
    remote.follow(cache)
    with outage(), serve(store_url=remote.url, store=cache.root) as client:
        assert answer(client, red)["model"]["version"] == "1"
        assert behind(client) == 1
    (record,) = [each for each in caplog.records if each.message == "the store cannot be followed"]
    assert BROKEN in record.__dict__["reason"]
    app = create_app(load_settings(store_url=remote.url, store=tmp_path / "new", device="cpu"))

    async def start() -> None:
        async with running(app):
            pass

    with outage(), pytest.raises(BundleError, match=BROKEN):
        asyncio.run(start())


def test_the_api_sends_whoever_wants_to_change_versions_to_the_store(
    serve: Serve, remote: RemoteStore, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    headers = bearer(write(keys)["admin"])
    settings = {"store_url": remote.url, "store": tmp_path / "cache", "api_keys_file": keys}
    with serve(**settings) as client:
        path = "/v1/admin/models/colours"
        assert client.get(path, headers=headers).json()["serving"] == "1"
        refused = client.post(f"{path}/versions/2/activate", headers=headers)
        assert refused.status_code == 409
        assert remote.url in refused.json()["detail"]
    assert remote.history("colours") == ["1"]


def test_bundles_are_pushed_activated_and_pulled_from_the_command_line(
    store: BundleStore, tmp_path: Path, red: bytes
) -> None:
    url = f"file://{tmp_path}/remote"

    def run(*words: object) -> str:
        result = CliRunner().invoke(cli, ["bundles", *map(str, words)])
        assert result.exit_code == 0, result.output
        return result.output

    push = ["push", url, "colours"]
    assert "version 1 is now in file://" in run(*push, 1, "--activate", "--store", store.root)
    assert "version 1 was already in" in run(*push, 1, "--store", store.root)
    run(*push, 2, "--store", store.root)
    run("activate", "colours", 2, "--url", url)
    pulled = BundleStore(tmp_path / "pulled")
    facts = json.loads(run("pull", url, "colours", "--store", pulled.root, "--json"))
    assert (facts["version"], facts["new"]) == ("2", True)
    pulled.open("colours", "2").verify()
    video = tmp_path / "video.mp4"
    video.write_bytes(red)
    result = CliRunner().invoke(
        cli,
        ["classify", str(video), "--store", str(tmp_path / "cache"), "--device", "cpu", "--json"],
        env={"TIMESFORMER_STORE_URL": url},
    )
    assert json.loads(result.output.splitlines()[-1])["model"]["version"] == "2"
