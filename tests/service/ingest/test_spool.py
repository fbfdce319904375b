"""The spool: its quota, and what is left of a server that was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.errors import SpoolFullError
from service.ingest.spool import PREFIX, Spool, SpoolFile
from service.settings import SettingsError


def test_a_file_holds_what_was_added_and_is_gone_after_its_block(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with spool.file() as file:
        file.add(b"one ")
        file.add(b"two")
        file.write()
        assert file.path.read_bytes() == b"one two"
        assert spool.used_bytes == file.size == 7
    assert list(spool.folder.iterdir()) == []
    assert spool.used_bytes == 0
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_the_quota_is_of_all_files_together_and_comes_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=10)
    with spool.file() as first:
        first.add(b"x" * 6)
        with spool.file() as second, pytest.raises(SpoolFullError):
            second.add(b"x" * 5)
        assert spool.used_bytes == 6
        with pytest.raises(SpoolFullError):
            spool.expect(5)
    spool.expect(10)
    with spool.file() as third:
        third.add(b"x" * 10)  # what is expected claims nothing


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    class FullDisk:
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    spool = Spool(tmp_path)
    with spool.file() as file:
        replace_file(file, FullDisk())
        file.add(b"x")
        with pytest.raises(SpoolFullError):
            file.write()
    assert list(spool.folder.iterdir()) == []


def test_a_disk_that_takes_less_than_it_was_given_gets_the_rest(tmp_path: Path) -> None:
    taken = bytearray()

    class Slow:
        def write(self, data: memoryview) -> int:
            taken.extend(data[:3])
            return len(data[:3])

        def close(self) -> None:
            pass

    with Spool(tmp_path).file() as file:
        replace_file(file, Slow())
        file.add(b"0123456789")
        file.write()
    assert taken == b"0123456789"


def replace_file(file: SpoolFile, other: Any) -> None:
    file._file.close()
    file._file = other


_OTHER_SERVER = """
import pathlib, sys, time
from service.ingest.spool import Spool
spool = Spool(pathlib.Path(sys.argv[1]))
with spool.file() as file:
    file.add(b"video")
    file.write()
    print(spool.folder.name, flush=True)
    time.sleep(600)
"""


def test_files_of_a_killed_server_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", _OTHER_SERVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    folders = [server.stdout.readline().strip() for server in servers if server.stdout]
    try:
        servers[0].send_signal(signal.SIGKILL)
        servers[0].wait(60)
        spool = Spool(tmp_path)
        found = {path.name for path in tmp_path.iterdir()}
        assert found == {"foreign", folders[1], spool.folder.name}
        assert [path.read_bytes() for path in (tmp_path / folders[1]).iterdir()] == [b"video"]
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def test_a_link_named_like_a_spool_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    parent = tmp_path / "spool"
    parent.mkdir()
    (parent / f"{PREFIX}x").symlink_to(elsewhere)
    Spool(parent)
    assert elsewhere.is_dir()


def test_a_folder_that_cannot_be_written_ends_the_start_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"TIMESFORMER_SPOOL_DIR.*nowhere.*No such file"):
        Spool(tmp_path / "nowhere")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_two_servers_that_start_at_once_never_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    made = os.mkdir
    others = []

    def mkdir(path: Any, mode: int = 0o777) -> None:
        made(path, mode)
        if not others:  # the other one starts between our folder and our lock on it
            others.append(None)
            others[0] = Spool(tmp_path)

    if moment == "after":
        others.append(Spool(tmp_path))
    monkeypatch.setattr("os.mkdir", mkdir)
    ours = Spool(tmp_path)
    assert ours.folder.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {ours.folder.name, others[0].folder.name}
