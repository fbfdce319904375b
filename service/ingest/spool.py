"""The spool: where uploads lie while they are decoded, within a quota, gone on every path.

Each server has a folder of its own in `TIMESFORMER_SPOOL_DIR` and holds a lock on it for as long as
it lives. The kernel drops the lock of a server that was killed, and the next one to start removes
the folder, however young its files are, and no other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from model.files import lock_folder
from service.errors import SpoolFullError
from service.settings import SettingsError

logger = logging.getLogger(__name__)
PREFIX = "timesformer-spool-"


class Spool:
    """A locked folder for files of limited size together.

    Args:
        parent: the folder that it is made in; folders of killed servers in it are removed.
        max_bytes: most bytes of all files at once; None leaves it to the disk.

    Raises:
        SettingsError: `parent` is not there or cannot be written.
    """

    def __init__(self, parent: Path, max_bytes: int | None = None) -> None:
        try:
            _remove_leftovers(parent)
            self.folder, self._lock = _claim(parent)
        except OSError as error:
            raise SettingsError(
                f"TIMESFORMER_SPOOL_DIR: cannot write to {parent}: {error.strerror}"
            ) from error
        self._max_bytes = max_bytes
        self.used_bytes = 0

    @contextlib.contextmanager
    def file(self) -> Iterator[SpoolFile]:
        """A new empty file; it and its share of the quota are free again after the block."""
        # A name of ours: nothing that the client sends becomes part of a path.
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        file = SpoolFile(self, Path(name), descriptor)
        try:
            yield file
        finally:
            file.close()
            file.path.unlink(missing_ok=True)
            self.used_bytes -= file.size

    def expect(self, count: int) -> None:
        """Asks whether so many bytes would fit at present; claims nothing, as they may never come.

        Raises:
            SpoolFullError: they would exceed the quota.
        """
        if self._max_bytes is not None and self.used_bytes + count > self._max_bytes:
            raise SpoolFullError("Too many uploads are being received at present.")

    def take(self, count: int) -> None:
        """Counts bytes that are about to be written.

        Raises:
            SpoolFullError: they would exceed the quota.
        """
        self.expect(count)
        self.used_bytes += count

    def close(self) -> None:
        """Removes the folder with whatever is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


class SpoolFile:
    """One upload: blocks are collected in memory and written a megabyte at a time."""

    def __init__(self, spool: Spool, path: Path, descriptor: int) -> None:
        self.path = path
        self.size = 0
        self.pending = 0
        """Bytes that were added and not yet written."""
        self.spool = spool
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._blocks: list[bytes] = []

    def add(self, data: bytes) -> None:
        """Takes a block, to be written by the next `write`.

        Raises:
            SpoolFullError: it does not fit into the quota.
        """
        self.spool.take(len(data))
        self._blocks.append(data)
        self.pending += len(data)
        self.size += len(data)

    def write(self) -> None:
        """Writes what was added; blocks, so not for the event loop.

        Raises:
            SpoolFullError: the disk is full.
        """
        blocks, self._blocks, self.pending = self._blocks, [], 0
        try:
            for block in blocks:
                view = memoryview(block)
                while view:
                    view = view[self._file.write(view) :]
        except OSError as error:
            logger.error("an upload cannot be spooled", extra={"reason": str(error)})
            raise SpoolFullError("There is no room for the upload at present.") from error

    def close(self) -> None:
        """Closes the file; it can still be read by its path."""
        self._file.close()


def _claim(parent: Path) -> tuple[Path, contextlib.ExitStack]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = _try_lock(folder)
        if lock is not None:
            return folder, lock
        # Another server that starts at this moment took it for a leftover.


def _remove_leftovers(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        lock = None if folder.is_symlink() else _try_lock(folder)
        if lock is None:
            continue  # of a server that lives
        logger.warning("removed uploads of a killed server", extra={"folder": folder.name})
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _try_lock(folder: Path) -> contextlib.ExitStack | None:
    """Locks a folder; None if another process has, it was removed, or belongs to another user."""
    lock = contextlib.ExitStack()
    try:
        lock.enter_context(lock_folder(folder, wait=False))
    except OSError:
        return None
    return lock
