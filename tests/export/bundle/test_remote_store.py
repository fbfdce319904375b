"""A store of bundles at a URL: pushed whole, fetched whole, followed, and never half of either."""

from __future__ import annotations

import json
import sys
import threading
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from export.bundle.bundle import Bundle, BundleError, BundleStore, Candidate
from export.bundle.manifest import MANIFEST
from export.bundle.remote_store import RemoteStore, StoreUnreachableError
from tests.export.conftest import publish_colours


@pytest.fixture(params=["memory", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteStore:
    if request.param == "memory":
        return RemoteStore(f"memory://{uuid.uuid4().hex}/bundles")
    return RemoteStore(f"file://{tmp_path}/remote")


@pytest.fixture
def cache(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "cache")


@pytest.fixture
def first(store: BundleStore) -> Bundle:
    return publish_colours(store)


def test_what_was_pushed_is_what_is_pulled(
    remote: RemoteStore, first: Bundle, cache: BundleStore
) -> None:
    assert remote.push(first) is True
    assert remote.push(first) is False
    assert (remote.names(), remote.versions("colours")) == (["colours"], ["1"])
    pulled = remote.pull("colours", "1", cache)
    pulled.verify()
    assert pulled.path == cache.root / "colours/1"
    assert (pulled.path / MANIFEST).read_bytes() == (first.path / MANIFEST).read_bytes()
    assert {path.name for path in cache.root.rglob(".*")} == set()


def test_a_cache_follows_what_is_active_and_what_is_tried(
    remote: RemoteStore, store: BundleStore, cache: BundleStore
) -> None:
    for _ in range(2):
        remote.push(publish_colours(store))
    remote.activate("colours", "1")
    remote.follow(cache)
    assert (cache.active("colours"), cache.versions("colours")) == ("1", ["1"])
    remote.activate("colours", "2")
    remote.follow(cache, ["colours"])
    assert (cache.active("colours"), cache.history("colours")) == ("2", ["2", "1"])
    _try(remote, Candidate(version="1", mode="shadow", share=0.5))
    remote.follow(cache)
    assert cache.candidate("colours") == remote.candidate("colours") is not None
    remote.activate("colours", "1")
    remote.follow(cache)
    assert (cache.active("colours"), cache.candidate("colours")) == ("1", None)


def test_activating_replaces_one_small_object(remote: RemoteStore, first: Bundle) -> None:
    remote.push(first)
    before = _objects(remote)
    remote.activate("colours", "1")
    after = _objects(remote)
    changed = {path for path in after if after[path] != before.get(path)}
    assert [path.rsplit("/", 1)[-1] for path in changed] == ["active.json"]
    assert json.loads(after[changed.pop()]) == {"version": "1", "previous": []}


def test_a_version_number_is_never_another_bundle(
    remote: RemoteStore, first: Bundle, tmp_path: Path
) -> None:
    remote.push(first)
    other = publish_colours(BundleStore(tmp_path / "other"), source="elsewhere")
    with pytest.raises(BundleError, match="a published version never changes"):
        remote.push(other)


def test_a_push_that_breaks_off_adds_no_version(
    remote: RemoteStore, first: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    send = remote._send

    def breaks(local: Path, path: str) -> None:
        if sent:
            raise StoreUnreachableError("the line is dead")
        sent.append(path)
        send(local, path)

    monkeypatch.setattr(remote, "_send", breaks)
    with pytest.raises(StoreUnreachableError):
        remote.push(first)
    assert remote.versions("colours") == []
    with pytest.raises(BundleError, match="push it first"):
        remote.activate("colours", "1")
    monkeypatch.undo()
    assert remote.push(first) is True


def test_what_was_damaged_on_the_way_or_there_is_not_taken(
    remote: RemoteStore, first: Bundle, cache: BundleStore
) -> None:
    remote.push(first)
    remote.activate("colours", "1")
    files, root = fsspec.core.url_to_fs(remote.url)
    content = bytearray(files.cat_file(f"{root}/colours/1/model.onnx"))
    content[10] ^= 1
    files.pipe_file(f"{root}/colours/1/model.onnx", bytes(content))
    with pytest.raises(BundleError, match="its hash is off"):
        remote.follow(cache)
    assert cache.versions("colours") == []
    assert cache.active("colours") is None
    files.pipe_file(f"{root}/colours/1/model.onnx", b"short")
    with pytest.raises(BundleError, match="is not of its size"):
        remote.activate("colours", "1")


def test_a_store_that_does_not_answer_leaves_the_cache_as_it_was(
    first: Bundle, cache: BundleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteStore(f"memory://{uuid.uuid4().hex}")
    remote.push(first)
    remote.activate("colours", "1")
    remote.follow(cache)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", _dead)
    with pytest.raises(StoreUnreachableError, match="cannot be reached: no route"):
        remote.follow(cache, ["colours"])
    assert cache.open("colours").version == "1"


def test_replicas_of_a_node_fetch_a_version_once(
    first: Bundle, cache: BundleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteStore(f"memory://{uuid.uuid4().hex}")
    remote.push(first)
    fetched: list[str] = []
    fetch = RemoteStore._fetch

    def counted(self: RemoteStore, path: str, local: Path) -> None:
        fetched.append(path)
        fetch(self, path, local)

    monkeypatch.setattr(RemoteStore, "_fetch", counted)
    replicas = [
        threading.Thread(target=remote.pull, args=("colours", "1", BundleStore(cache.root)))
        for _ in range(4)
    ]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.join()
    assert sorted(fetched) == sorted(f"colours/1/{name}" for name in first.manifest.files)


def test_what_a_version_lacks_is_said(
    remote: RemoteStore, first: Bundle, cache: BundleStore
) -> None:
    with pytest.raises(BundleError, match="has no version 7 of colours"):
        remote.pull("colours", "7", cache)
    remote.push(first)
    files, root = fsspec.core.url_to_fs(remote.url)
    files.rm_file(f"{root}/colours/1/model.onnx")
    with pytest.raises(BundleError, match="lacks a file"):
        remote.pull("colours", "1", cache)
    assert cache.versions("colours") == []


@pytest.mark.parametrize("url", ["nosuch://bucket/bundles", "s3://bucket/bundles"])
def test_a_url_that_nothing_reaches_says_what_to_install(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(BundleError, match=url.split(":")[0]) as error:
        RemoteStore(url)
    if url.startswith("s3"):
        assert "objectstore" in str(error.value)


def _dead(*_: object, **__: object) -> None:
    raise OSError("no route")


def _objects(remote: RemoteStore) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(remote.url)
    return {path: files.cat_file(path) for path in files.find(root)}


def _try(remote: RemoteStore, candidate: Candidate) -> None:
    remote._write("colours/candidate.json", candidate.model_dump_json().encode())
