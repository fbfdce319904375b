"""Lists and videos that lie elsewhere: `s3://`, `gs://`, `https://` and whatever else fsspec knows.

A decoder reads local files only, so a remote video is fetched as a whole into a temporary one.
fsspec is imported when the first URL is met: nothing that serves meets one.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from model.training.errors import DataError, MissingVideo, UnreachableVideo

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"(?<=://)[^/\s\"?@]*@")
_QUERY = re.compile(r'(://[^?"]*)\?(?:[^\s"\\]|\\.)*')
_PAUSES_S = (0.5, 2.0, 5.0)  # before each further attempt
_MAX_VIDEO_BYTES = 4 << 30
_TRY_AGAIN = (408, 425, 429)  # of the HTTP codes from 400 to 499, which else stay as they are
_GONE = (FileNotFoundError, IsADirectoryError, PermissionError, ValueError)

Answer = TypeVar("Answer")


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def without_secrets(text: str) -> str:
    """A text, or JSON, with the URLs in it cut where a signature or a password would stand."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def joined(base: str, name: str) -> str:
    """A path or URL of a list, relative to the folder or URL `base`."""
    if is_url(name):
        return name
    if is_url(base) and not Path(name).is_absolute():
        return f"{base.rstrip('/')}/{name}"
    return str(Path(base) / name)


def parent(path: str) -> str:
    """The folder or URL that a list lies in."""
    return path.rsplit("/", 1)[0] if is_url(path) else str(Path(path).parent)


def check_protocols(paths: Iterable[str]) -> None:
    """Refuses URLs that nothing installed can fetch, before the first of many is.

    Raises:
        DataError: names a URL and what to install.
    """
    by_scheme = {path.split("://", 1)[0]: path for path in paths if is_url(path)}
    for url in by_scheme.values():
        _filesystem(url)


def read_bytes(url: str) -> bytes:
    """The contents of a list.

    Raises:
        DataError: it cannot be fetched.
    """
    return _tried(url, lambda files, path: bytes(files.cat_file(path)))


def folder_files(url: str) -> dict[str, str] | None:
    """URLs of all files below a folder by their names in it, sorted; None where it is no folder.

    Raises:
        DataError: it cannot be listed.
    """

    def find(files: Any, path: str) -> dict[str, str] | None:
        if not files.isdir(path):
            return None
        return {
            found.removeprefix(path.rstrip("/")).lstrip("/"): files.unstrip_protocol(found)
            for found in sorted(files.find(path))
        }

    return _tried(url, find)


@contextmanager
def local_video(path: str) -> Iterator[str]:
    """The path of a local video; a remote one is fetched, and removed at the end.

    Raises:
        MissingVideo: there is none, or it is not ours to read.
        UnreachableVideo: it could not be fetched, although it was tried again.
        DataError: a package is missing.
    """
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="timesformer-") as folder:
        local = Path(folder) / "video"
        try:
            _attempts(path, lambda files, remote: _fetch(files, remote, local))
        except _GONE as error:
            raise MissingVideo(f"It cannot be fetched: {_in_words(error)}.") from error
        except DataError:
            raise
        except Exception as error:  # every file system has a tree of its own
            if _is_final(error):
                raise MissingVideo(f"It cannot be fetched: {_in_words(error)}.") from error
            raise UnreachableVideo(
                f"It could not be fetched in {len(_PAUSES_S) + 1} attempts: {_in_words(error)}."
            ) from error
        yield str(local)


def _fetch(files: Any, path: str, local: Path) -> None:
    size = files.size(path)
    if size is not None and size > _MAX_VIDEO_BYTES:
        raise ValueError(f"{size / 1e9:.1f} GB are more than {_MAX_VIDEO_BYTES / 1e9:.1f}")
    files.get_file(path, str(local))


def _tried(url: str, do: Callable[[Any, str], Answer]) -> Answer:
    try:
        return _attempts(url, do)
    except DataError:
        raise
    except Exception as error:  # every file system has a tree of its own
        raise DataError(f"cannot fetch {url}: {_in_words(error)}") from error


def _attempts(url: str, do: Callable[[Any, str], Answer]) -> Answer:
    """What `do` returns; errors that may pass are given time."""
    files, path = _filesystem(url)
    for pause in _PAUSES_S:
        try:
            return do(files, path)
        except Exception as error:
            if _is_final(error):
                raise
            time.sleep(pause)
    return do(files, path)


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(url)
    except ImportError as error:
        raise DataError(
            f"cannot fetch {url}: a package for {url.split('://', 1)[0]}:// is not installed "
            f"({error})"
        ) from error
    except Exception as error:  # a scheme that nobody knows; credentials that are not there
        raise DataError(f"cannot fetch {url}: {_in_words(error)}") from error
    return files, path


def _is_final(error: Exception) -> bool:
    """Whether the same request would get the same answer."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _TRY_AGAIN
    return isinstance(error, _GONE)


def _in_words(error: Exception) -> str:
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if status and message:
        return f"{status} {message}"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"{error or type(error).__name__}"
