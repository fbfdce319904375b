"""Publishing, activating and rolling back; and everything that must not go wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from export.bundle.bundle import ACTIVE, Bundle, BundleError, BundleStore, sha256_of
from export.bundle.manifest import LABELS, MANIFEST, ONNX_FLOAT32, WEIGHTS
from tests.export.conftest import PASSED, publish_colours

FullDisk = Callable[[int], AbstractContextManager[None]]

# A process of its own that publishes a bundle again, so many times.
REPUBLISH = """
import shutil, sys
from pathlib import Path
from export.bundle.bundle import Bundle, BundleStore

source, times = Path(sys.argv[1]), int(sys.argv[2])
store, manifest = BundleStore(source.parents[1]), Bundle(source).manifest
for _ in range(times):
    with store.staging(manifest.name) as staging:
        for name in manifest.files:
            shutil.copy(source / name, staging / name)
        print("staged", flush=True)
        if sys.argv[3:] == ["wait"]:
            sys.stdin.read()
        print(store.publish(staging, manifest).version, flush=True)
"""


class Interruption(BaseException):
    """As KeyboardInterrupt: no Exception."""


def files_of(store: BundleStore) -> set[str]:
    return {path.relative_to(store.root).as_posix() for path in store.root.rglob("*")}


def stop_half_way(staging: Path) -> None:
    (staging / ONNX_FLOAT32).write_bytes(b"half")
    raise Interruption


def change_manifest(bundle: Bundle, **changes: Any) -> Path:
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    (bundle.path / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    return bundle.path


def republish(bundle: Bundle, times: int, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", REPUBLISH, str(bundle.path), str(times), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start_staging(bundle: Bundle) -> subprocess.Popen[str]:
    """A process that has staged a bundle and waits before it publishes."""
    process = republish(bundle, 1, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "staged\n"
    return process


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


class TestPublishing:
    def test_versions_count_up_from_one(self, store: BundleStore) -> None:
        assert [publish_colours(store).version for _ in range(3)] == ["1", "2", "3"]
        assert store.versions("colours") == ["1", "2", "3"]
        assert store.names() == ["colours"]

    def test_the_tenth_version_comes_after_the_ninth(self, store: BundleStore) -> None:
        path = publish_colours(store).path
        path.rename(path.with_name("9"))
        change_manifest(Bundle(path.with_name("9")), version="9")

        assert publish_colours(store).version == "10"
        assert store.versions("colours") == ["9", "10"]

    def test_the_manifest_lists_every_file_with_size_and_hash(self, store: BundleStore) -> None:
        bundle = publish_colours(store)

        assert bundle.manifest.files.keys() == {LABELS, ONNX_FLOAT32, WEIGHTS}
        for name, entry in bundle.manifest.files.items():
            assert entry.size == (bundle.path / name).stat().st_size
            assert entry.sha256 == sha256_of(bundle.path / name)
        bundle.verify()

    def test_a_published_bundle_can_be_read_by_other_users(self, store: BundleStore) -> None:
        assert publish_colours(store).path.stat().st_mode & 0o777 == 0o755

    def test_publishing_alone_activates_nothing(self, store: BundleStore) -> None:
        publish_colours(store)
        assert store.active("colours") is None
        with pytest.raises(BundleError, match="bundles activate colours VERSION"):
            store.open("colours")

    def test_what_failed_verification_is_not_published(self, store: BundleStore) -> None:
        failed = PASSED.model_copy(update={"passed": False})
        for verification in ({ONNX_FLOAT32: failed}, {}):
            with pytest.raises(BundleError, match="did not pass verification"):
                publish_colours(store, verification=verification)
        assert (store.names(), store.versions("colours")) == ([], [])

    def test_a_failure_on_the_way_leaves_the_store_as_it_was(self, store: BundleStore) -> None:
        publish_colours(store)
        before = files_of(store)

        with pytest.raises(Interruption), store.staging("colours") as staging:
            stop_half_way(staging)

        assert files_of(store) == before

    def test_a_deleted_version_is_not_numbered_again(self, store: BundleStore) -> None:
        publish_colours(store)
        store.activate("colours", publish_colours(store).version)
        (store.root / "colours/2").rename(store.root / "gone")

        assert publish_colours(store).version == "3"

    def test_a_damaged_version_folder_is_not_in_the_way(self, store: BundleStore) -> None:
        (publish_colours(store).path / MANIFEST).unlink()
        assert publish_colours(store).version == "2"
        assert store.versions("colours") == ["2"]

    @pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 65, "/tmp"])  # noqa: S108
    def test_a_name_that_is_a_path_is_refused(self, store: BundleStore, name: str) -> None:
        with pytest.raises(BundleError, match="is no bundle name"), store.staging(name):
            pass
        with pytest.raises(BundleError, match="is no bundle name"):
            store.open(name)
        assert not store.root.exists()


class TestDisk:
    @pytest.mark.parametrize("room", [100, 900])
    def test_a_full_disk_leaves_the_store_as_it_was(
        self, store: BundleStore, full_disk: FullDisk, room: int
    ) -> None:
        """100 bytes hold no graph; 900 hold the graph but not the manifest."""
        publish_colours(store)
        before = files_of(store)

        with pytest.raises(BundleError, match=r"cannot write .*colours.* nothing has changed"):  # noqa: SIM117
            with full_disk(room):
                publish_colours(store)

        assert files_of(store) == before
        assert publish_colours(store).version == "2"

    def test_a_full_disk_leaves_the_old_version_active(
        self, store: BundleStore, full_disk: FullDisk
    ) -> None:
        publish_colours(store), publish_colours(store)
        store.activate("colours", "1")

        with pytest.raises(BundleError, match="cannot write"), full_disk(5):
            store.activate("colours", "2")

        assert store.active("colours") == "1"

    def test_a_store_that_is_a_file_is_an_error_in_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        store = BundleStore(tmp_path / "file")
        assert store.names() == []
        with pytest.raises(BundleError, match="cannot write"):
            publish_colours(store)


class TestSeveralProcesses:
    def test_a_killed_export_shows_nothing_and_its_leftovers_go(self, store: BundleStore) -> None:
        bundle = publish_colours(store)
        process = start_staging(bundle)
        leftovers = list(bundle.path.parent.glob(".staging-*"))
        stop(process)

        assert [(path / ONNX_FLOAT32).is_file() for path in leftovers] == [True]
        assert store.versions("colours") == ["1"]
        assert publish_colours(store).version == "2"
        assert not list(bundle.path.parent.glob(".staging-*"))

    def test_an_export_in_progress_is_left_alone(self, store: BundleStore) -> None:
        process = start_staging(publish_colours(store))
        try:
            assert publish_colours(store).version == "2"
            output, _ = process.communicate("")
            assert output == "3\n"
        finally:
            stop(process)
        store.open("colours", "3").verify()

    def test_concurrent_exports_get_versions_of_their_own(self, store: BundleStore) -> None:
        bundle = publish_colours(store)
        processes = [republish(bundle, 4) for _ in range(3)]
        outputs = [process.communicate()[0].split() for process in processes]
        versions = [int(word) for words in outputs for word in words if word != "staged"]

        assert sorted(versions) == list(range(2, 14))
        assert store.versions("colours") == [str(number) for number in range(1, 14)]
        assert all(process.returncode == 0 for process in processes)


class TestActivating:
    def test_the_active_version_is_what_opens(self, store: BundleStore) -> None:
        publish_colours(store), publish_colours(store)
        assert store.activate("colours", "1").version == "1"
        assert store.active("colours") == store.open("colours").version == "1"
        store.activate("colours", "2")
        assert store.open("colours").version == "2"

    @pytest.mark.parametrize("damage", ["flipped", "truncated", "removed", "unverified", "failed"])
    def test_a_bundle_that_is_not_sound_is_refused_and_the_old_one_stays(
        self, store: BundleStore, damage: str
    ) -> None:
        publish_colours(store)
        store.activate("colours", "1")
        bundle = publish_colours(store)
        file = bundle.file(ONNX_FLOAT32)
        content = bytearray(file.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        elif damage == "truncated":
            file.write_bytes(content[:-1])
        elif damage == "removed":
            file.unlink()
        elif damage == "unverified":
            change_manifest(bundle, verification={})
        else:
            failed = PASSED.model_copy(update={"passed": False})
            change_manifest(bundle, verification={ONNX_FLOAT32: failed.model_dump()})

        with pytest.raises(BundleError, match=r"colours/2/model\.onnx"):
            store.activate("colours", "2")

        assert store.active("colours") == "1"

    def test_a_bundle_without_a_graph_is_refused(self, store: BundleStore) -> None:
        bundle = publish_colours(store)
        change_manifest(bundle, files={})
        with pytest.raises(BundleError, match="nothing to serve"):
            store.activate("colours", "1")

    def test_what_is_not_there_is_refused_and_the_error_names_what_is(
        self, store: BundleStore
    ) -> None:
        publish_colours(store)
        with pytest.raises(BundleError, match="no version 7 of colours; it has: 1"):
            store.activate("colours", "7")
        with pytest.raises(BundleError, match="no version 1 of x; it has: none"):
            store.activate("x", "1")
        with pytest.raises(BundleError, match=r"no version \.\./1 of colours"):
            store.activate("colours", "../1")
        with pytest.raises(BundleError, match="has no bundle named x"):
            store.rollback("x")

    def test_rolling_back_goes_through_what_was_active(self, store: BundleStore) -> None:
        for _ in range(3):
            store.activate("colours", publish_colours(store).version)
        store.activate("colours", "3")  # already is: nothing to go back over

        assert [store.rollback("colours").version for _ in range(2)] == ["2", "1"]
        with pytest.raises(BundleError, match="no earlier active version"):
            store.rollback("colours")
        assert store.active("colours") == "1"

    def test_rolling_back_to_a_damaged_bundle_is_refused(self, store: BundleStore) -> None:
        first = publish_colours(store)
        store.activate("colours", "1")
        store.activate("colours", publish_colours(store).version)
        first.file(LABELS).write_text("changed")

        with pytest.raises(BundleError, match=r"1/labels\.txt"):
            store.rollback("colours")

        assert store.active("colours") == "2"

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", "{}", '{"version": "1"}', '{"version": "../x", "previous": []}']
    )
    def test_a_damaged_pointer_says_what_to_do(self, store: BundleStore, content: str) -> None:
        publish_colours(store)
        pointer = store.root / "colours" / ACTIVE
        pointer.write_text(content)

        for attempt in (store.active, store.open, store.rollback):
            with pytest.raises(BundleError, match=r"active\.json .* remove it and activate"):
                attempt("colours")

        pointer.unlink()
        store.activate("colours", "1")
        assert store.active("colours") == "1"

    @pytest.mark.parametrize("reason", [errno.EIO, errno.ESTALE, errno.EACCES])
    def test_a_disk_that_does_not_give_a_file_is_an_error_of_ours(
        self, store: BundleStore, reason: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle, error = publish_colours(store), OSError(reason, os.strerror(reason))

        def fails(*given: object, **options: object) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("hashlib.file_digest", fails)
            with pytest.raises(BundleError, match=rf"cannot read .*: {os.strerror(reason)}"):
                bundle.verify()
            with pytest.raises(BundleError, match="cannot read"):
                store.activate("colours", "1")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "is_file", fails)
            with pytest.raises(BundleError, match=r"cannot read .*colours: "):
                store.open("colours", "1")
            with pytest.raises(BundleError, match="cannot read"):
                bundle.verify()
        bundle.verify()

    def test_a_pointer_that_cannot_be_read_is_not_called_damaged(self, store: BundleStore) -> None:
        publish_colours(store)
        (store.root / "colours" / ACTIVE).mkdir()
        with pytest.raises(BundleError, match=r"cannot read .*active\.json: Is a directory"):
            store.active("colours")

    def test_the_pointer_stays_small(self, store: BundleStore) -> None:
        publish_colours(store), publish_colours(store)
        for number in range(60):
            store.activate("colours", "12"[number % 2])
        assert len(json.loads((store.root / "colours" / ACTIVE).read_text())["previous"]) == 20


class TestManifest:
    @pytest.mark.parametrize("file", ["../x", "/etc/passwd", "a/../../x", ""])
    def test_a_file_outside_the_bundle_is_refused(self, store: BundleStore, file: str) -> None:
        path = change_manifest(
            publish_colours(store), files={file: {"sha256": "0" * 64, "size": 1}}
        )
        with pytest.raises(BundleError, match="is not a path inside the bundle"):
            Bundle(path)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"schema_version": 2}, "schema_version: Input should be 1"),
            ({"labels": ["red"]}, "1 labels for 3 classes"),
            ({"surprise": 1}, "surprise: Extra inputs"),
            ({"architecture": {"depth": 0}}, "depth is 0"),
            ({"created": "yesterday"}, "created: "),
        ],
    )
    def test_what_cannot_be_used_is_said_in_one_line(
        self, store: BundleStore, change: dict[str, Any], reason: str
    ) -> None:
        path = change_manifest(publish_colours(store), **change)
        with pytest.raises(BundleError) as caught:
            Bundle(path)
        assert reason in str(caught.value)
        assert str(path / MANIFEST) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
    def test_a_damaged_manifest_is_an_error_of_ours(
        self, store: BundleStore, content: bytes
    ) -> None:
        path = publish_colours(store).path
        (path / MANIFEST).write_bytes(content)
        with pytest.raises(BundleError, match="cannot be used"):
            Bundle(path)

    def test_a_folder_without_one_is_no_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="it is not a bundle"):
            Bundle(tmp_path)

    def test_a_bundle_copied_under_another_name_is_refused(self, store: BundleStore) -> None:
        publish_colours(store)
        (store.root / "colours").rename(store.root / "shapes")
        with pytest.raises(BundleError, match="is of colours version 1"):
            store.open("shapes", "1")

    def test_a_file_that_is_not_listed_cannot_be_had(self, store: BundleStore) -> None:
        bundle = publish_colours(store)
        with pytest.raises(BundleError, match=r"colours version 1 has no model\.fp16\.onnx"):
            bundle.file("model.fp16.onnx")


def test_a_store_that_is_not_there_is_empty(store: BundleStore) -> None:
    assert (store.names(), store.versions("colours"), store.active("colours")) == ([], [], None)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_store_that_may_not_be_read_is_an_error_in_one_sentence(store: BundleStore) -> None:
    store.root.mkdir()
    store.root.chmod(0)
    try:
        with pytest.raises(BundleError, match="cannot read"):
            store.names()
    finally:
        store.root.chmod(0o700)


def test_a_manifest_from_before_a_field_was_added_is_read(store: BundleStore) -> None:
    bundle = publish_colours(store)
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    parity = manifest["verification"][ONNX_FLOAT32]
    added = ("network_cost", "graph_cost", "temperature")
    of_8_bits = ("centred_cosine", "embedding_cosine", "softmax_divergence", "cosine_limit")
    of_labels = ("top5_agreement", "low_margin_clips", "low_margin_agreement")
    for name in added:
        del manifest[name]
    for name in of_8_bits + of_labels:
        del parity[name]
    (bundle.path / MANIFEST).write_text(json.dumps(manifest))

    old = store.open("colours", "1")
    old.verify()
    assert (old.manifest.network_cost, old.manifest.temperature) == (None, 1.0)
