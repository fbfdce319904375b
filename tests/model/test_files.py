"""Files are replaced whole or not at all; a lock has one holder and dies with its process."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from model.files import LockTakenError, lock_file, lock_folder, replacing, sync, write_atomic

REPOSITORY = Path(__file__).parents[2]
Lock = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("old")
    return path


def everything(file: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in file.parent.iterdir()}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("content", ["neu: ü", "neu: ü".encode()])
def test_write_atomic_replaces_the_content_and_leaves_nothing_else(
    file: Path, content: bytes | str, durable: bool
) -> None:
    write_atomic(file, content, durable=durable)
    assert everything(file) == {"file": "neu: ü"}


def test_write_atomic_creates_a_file_with_the_mode_that_was_asked_for(file: Path) -> None:
    write_atomic(file.with_name("secret"), "x", mode=0o600)
    write_atomic(file, "x")
    assert file.with_name("secret").stat().st_mode & 0o777 == 0o600
    file.with_name("usual").touch()
    assert file.stat().st_mode == file.with_name("usual").stat().st_mode


def test_write_atomic_on_a_full_disk_leaves_the_old_file_alone(file: Path) -> None:
    """A limit on the size of files fails a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(file, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert everything(file) == {"file": "old"}


def test_write_atomic_when_the_disk_fails_to_sync_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(file, "new", durable=True)
    assert everything(file) == {"file": "old"}


def test_write_atomic_killed_before_the_rename_leaves_the_old_file(file: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from model.files import write_atomic
Path.replace = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
write_atomic(Path({str(file)!r}), "new")
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    write_atomic(file, "newer")  # over what the killed process left
    assert everything(file) == {"file": "newer"}


def test_write_atomic_durable_syncs_the_content_before_the_name(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, str]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, file.read_text()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(file, "new")
    assert synced == []
    write_atomic(file, "newer", durable=True)
    assert synced == [(".file.tmp", "new"), ("folder", "newer")]


def test_replacing_makes_a_folder_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new"

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.mkdir()
            (temporary / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with replacing(target, suffix="1.tmp") as temporary:
        assert temporary.name == ".new.1.tmp"
        temporary.mkdir()
        (temporary / "whole").touch()
        assert not target.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "whole"]


def test_sync_ignores_only_that_a_folder_cannot_be_synced(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fails)
    sync(file.parent)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(file)


@pytest.mark.parametrize("lock", [lock_file, lock_folder])
def test_lock_has_one_holder_and_ends_with_its_block(file: Path, lock: Lock) -> None:
    path = file if lock is lock_file else file.parent
    for _ in range(2):
        with lock(path, wait=False):
            with pytest.raises(LockTakenError, match=str(path)), lock(path, wait=False):
                pass
            with pytest.raises(LockTakenError), lock(path, wait=False):
                pass  # the failed attempt has released nothing
    assert file.read_text() == "old"


def test_lock_file_creates_its_file_with_the_mode_that_was_asked_for(file: Path) -> None:
    with lock_file(file.with_name("lock"), mode=0o600):
        pass
    assert file.with_name("lock").stat().st_mode & 0o777 == 0o600


def test_lock_folder_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), lock_folder(tmp_path / "none"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_waits_for_its_holder_and_survives_no_process(file: Path) -> None:
    code = f"""
from pathlib import Path
from model.files import lock_file
with lock_file(Path({str(file)!r})):
    print("locked", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LockTakenError), lock_file(file, wait=False):
            pass
        holder.kill()
        with lock_file(file):
            assert holder.wait(60) == -signal.SIGKILL


def test_lock_follows_a_path_that_was_replaced_while_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a folder that its holder removes must not hold a lock on nothing."""
    folder = tmp_path / "folder"
    folder.mkdir()
    waits = threading.Event()
    real = os.open
    monkeypatch.setattr(os, "open", lambda *given, **more: (real(*given, **more), waits.set())[0])

    def wait() -> None:
        with lock_folder(folder), pytest.raises(LockTakenError), lock_folder(folder, wait=False):
            pass

    with lock_folder(folder):
        waits.clear()
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert waits.wait(60)
        folder.rmdir()
        folder.mkdir()
    waiting.join(60)
    assert not waiting.is_alive()
