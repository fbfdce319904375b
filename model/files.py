"""Files that are replaced whole, and locks between processes.

A reader sees the old content or the new one. A full disk or a `kill -9` leaves the old file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})


class LockTakenError(OSError):
    """Another process has locked the file or folder."""


def write_atomic(
    path: Path, content: bytes | memoryview | str, *, durable: bool = False, mode: int = 0o666
) -> None:
    """Writes or replaces a file. Text is written as UTF-8.

    Args:
        durable: the content has reached the disk when the function returns.
        mode: permissions of the new file, less the umask.

    Raises:
        OSError: the disk is full or cannot be written to; the old file is unchanged.
    """
    with replacing(path, durable=durable) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, suffix: str = "tmp") -> Iterator[Path]:
    """Yields the path of a temporary file or folder, which replaces `path` when the block ends.

    The temporary path is always `.NAME.SUFFIX` beside `path`, so that the next write overwrites
    the leftover of a killed process. Two processes that may write the same path need a lock or
    different suffixes. An exception in the block removes the temporary file or folder.

    Args:
        durable: the content and the new name have reached the disk when the block has ended.

    Raises:
        OSError: as `write_atomic`.
    """
    temporary = path.with_name(f".{path.name}.{suffix}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, has reached the disk.

    Some network file systems cannot sync a folder; the function ignores that.

    Raises:
        OSError: the disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock_file(path: Path, *, wait: bool = True, mode: int = 0o666) -> Iterator[None]:
    """Locks a file for the block; creates the file if needed and never removes it.

    The kernel releases the lock of a process that dies.

    Args:
        wait: until the process that has locked the file releases it.
        mode: permissions of a new file, less the umask.

    Raises:
        LockTakenError: another process has locked it, and `wait` is false.
        OSError: the file cannot be created.
    """
    with _locked(path, os.O_RDWR | os.O_CREAT, wait, mode):
        yield


@contextlib.contextmanager
def lock_folder(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Locks an existing folder for the block, as `lock_file` does a file.

    Raises:
        LockTakenError: another process has locked it, and `wait` is false.
        OSError: the folder does not exist, or was removed while the function waited.
    """
    with _locked(path, os.O_RDONLY | os.O_DIRECTORY, wait):
        yield


@contextlib.contextmanager
def _locked(path: Path, flags: int, wait: bool, mode: int = 0) -> Iterator[None]:
    while True:
        descriptor = os.open(path, flags, mode)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise LockTakenError(f"another process has locked {path}") from None
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                continue  # the path was removed and made anew before the lock was granted
            yield
            return
        finally:
            os.close(descriptor)
