"""Which videos there are: a folder, a list, one file, an object store's prefix; none is opened."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from model.data.lists import VIDEO_SUFFIXES
from model.data.remote import (
    check_protocols,
    folder_files,
    is_url,
    joined,
    parent,
    read_bytes,
    without_secrets,
)
from model.training.errors import DataError
from service.offline.errors import LabellingError

_LISTS = (".txt", ".csv", ".parquet")


def find_videos(source: str, column: str = "path", root: str | None = None) -> dict[str, str]:
    """Paths or URLs of the videos by their names in the table, each once, in the source's order.

    A name is the path as text that every reader of Parquet takes: bytes of it that are no UTF-8
    are escaped, and the signature of a URL is left out, since it is a secret and changes.

    Args:
        source: a folder or prefix, whose video files are taken at any depth; a `.txt` with a path
            a line; a `.csv` or `.parquet` with a column of paths; or one video. Or a URL of these.
        column: that column.
        root: folder or URL that relative paths of a list are relative to; by default where it lies.

    Raises:
        DataError: it cannot be read or fetched.
        LabellingError: there are no videos in it.
    """
    try:
        paths = dict.fromkeys(_paths(source, column, root))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {source}: {error}") from error
    if not paths:
        raise LabellingError(f"there are no videos in {without_secrets(source)}")
    check_protocols(paths)
    return {_name(path): path for path in paths}


def _name(path: str) -> str:
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return without_secrets(text) if is_url(path) else text


def _paths(source: str, column: str, root: str | None) -> Iterable[str]:
    suffix = PurePosixPath(source).suffix.lower()
    if is_url(source):
        files = None if suffix in _LISTS else folder_files(source)
        if files is not None:
            return [url for name, url in files.items() if _is_video(name)]
        if suffix not in _LISTS:
            return [source]
        content = read_bytes(source)
    elif Path(source).is_dir():
        return _in_folder(Path(source))
    elif suffix not in _LISTS:
        return [source]
    else:
        content = Path(source).read_bytes()
    base = parent(source) if root is None else root
    return [joined(base, path) for path in _listed(content, suffix, column, source)]


def _in_folder(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    return [str(folder / name) for name in names if _is_video(name)]


def _is_video(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in VIDEO_SUFFIXES and not hidden


def _listed(content: bytes, suffix: str, column: str, source: str) -> list[str]:
    if suffix == ".parquet":
        return _parquet_column(content, column, source)
    # Paths of this machine may be no UTF-8.
    text = content.decode("utf-8-sig", "surrogateescape")
    if suffix == ".txt":
        return [line for line in text.splitlines() if line.strip()]
    table = csv.DictReader(io.StringIO(text, newline=""))
    if column not in (table.fieldnames or ()):
        raise _no_column(source, column, table.fieldnames or ())
    return [row[column] for row in table if row[column]]


def _parquet_column(content: bytes, column: str, source: str) -> list[str]:
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(BufferReader(content))
        if column not in file.schema_arrow.names:
            raise _no_column(source, column, file.schema_arrow.names)
        values = file.read([column])[column].to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{source} is no Parquet table: {error}") from error
    return [str(value) for value in values if value not in (None, "")]


def _no_column(source: str, column: str, names: Iterable[str]) -> LabellingError:
    return LabellingError(
        f"{source} has no column {column!r}; its first line has {', '.join(names) or 'none'}. "
        "--column says which one holds the paths; a list of paths alone is a .txt"
    )
