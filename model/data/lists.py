"""Labelled videos from the lists that data sets come as, and splits of them. No torch.

A source is one of
    a folder                one folder per class, videos inside
    a CSV without a header  Kinetics style: `path label` or `path,label`; index or name
    a CSV with a header     columns `path`, `label` and, if there is one, `group`
    Parquet                 the same columns
    a JSON list             Something-Something: objects with `id`, `template` or `label`
Each may be local or a URL, and so may the videos in it; see `remote.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from model.data.remote import (
    check_protocols,
    folder_files,
    is_url,
    joined,
    parent,
    read_bytes,
)
from model.files import write_atomic
from model.labels import LabelError, labels_from_json, read_labels
from model.training.errors import DataError

# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".ogv", ".ts", ".webm", ".wmv",
})
# fmt: on
_PARQUET = ".parquet"
_SOMETHING_SUFFIXES = (".webm", ".mp4")  # of the set as published, and as often converted


class Sample(NamedTuple):
    """One labelled video. Samples of one `group` never end up on both sides of a split."""

    path: str
    label: int
    group: str


class Columns(NamedTuple):
    """Names of a table's columns. A table without the `group` column has each video for itself."""

    path: str = "path"
    label: str = "label"
    group: str = "group"


@dataclasses.dataclass(frozen=True)
class VideoList:
    """A data set: `samples` in the order of the source, `labels` in the order of the classes."""

    samples: tuple[Sample, ...]
    labels: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 of every path, label and class name, in order."""
        content = json.dumps([self.labels, self.samples], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def split(self, held_out: float, seed: int = 0) -> tuple[VideoList, VideoList]:
        """(the rest, the held-out part), about `held_out` of the groups in the latter.

        A group's side depends on its name and the seed alone: it stays where it is when the set
        grows, so that a hold-out never leaks into later training.

        Raises:
            DataError: nothing is left on one of the sides.
        """
        groups = {sample.group for sample in self.samples}
        chosen = {group for group in groups if _draw(group, seed) < held_out}
        parts = [
            dataclasses.replace(
                self, samples=tuple(s for s in self.samples if (s.group in chosen) == side)
            )
            for side in (False, True)
        ]
        if not all(part.samples for part in parts):
            raise DataError(
                f"a hold-out of {held_out:g} leaves one side of {len(self.samples)} videos in "
                f"{len(groups)} groups empty: "
                "take another share or seed, or give a validation list"
            )
        return parts[0], parts[1]

    def counts(self) -> list[int]:
        """Videos of each class."""
        counts = [0] * len(self.labels)
        for sample in self.samples:
            counts[sample.label] += 1
        return counts


def _draw(group: str, seed: int) -> float:
    """A number in [0, 1) that belongs to the group."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def read_videos(
    source: str | Path,
    *,
    labels: Sequence[str] | None = None,
    root: str | Path | None = None,
    columns: Columns = Columns(),  # noqa: B008 (immutable)
) -> VideoList:
    """Reads a source of any kind; files are not opened.

    Args:
        labels: names of the classes, in order. Without them they are the names that occur, sorted;
            or `class 0` and so on, where the source has indices only.
        root: folder or URL that relative paths are relative to; by default where the list lies.

    Raises:
        DataError: the source cannot be read, or a line in it is wrong; says which.
    """
    path = str(source)
    base = str(root) if root is not None else parent(path)
    try:
        rows = list(_rows(path, base, columns))
        check_protocols(video for video, _, _ in rows)
        return _with_indices(rows, labels)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except DataError as error:
        raise DataError(str(error) if path in str(error) else f"{path}: {error}") from error


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """A label file of any kind `model.labels` reads, or Something-Something's `{"name": "0"}`.

    Raises:
        LabelError: the file cannot be read, or its labels are empty, repeated or have gaps.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return read_labels(path)  # plain text, or an error in better words than ours
    if isinstance(value, dict) and all(
        isinstance(index, str) and index.isdecimal() for index in value.values()
    ):
        if all(name.isdecimal() for name in value):
            raise LabelError(f"{path}: both names and indices are numbers")
        return labels_from_json({name: int(index) for name, index in value.items()})
    return read_labels(path)


def write_list(videos: VideoList, path: Path) -> None:
    """Writes the list as a table that `read_videos` reads back, paths made absolute.

    Raises:
        DataError: it cannot be written.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Columns())
    for sample in videos.samples:
        where = sample.path if is_url(sample.path) else Path(sample.path).absolute()
        table.writerow([where, videos.labels[sample.label], sample.group])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.getvalue())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error


# ---- the kinds of sources: rows of (path, label as it stands there, group) ----------------------
# A video without a group is one by itself, by its name in the list: the split is the same wherever
# the videos lie.

_Row = tuple[str, str, str]
_LIST_SUFFIXES = (".csv", ".txt", ".tsv", ".json", _PARQUET)


def _rows(path: str, base: str, columns: Columns) -> Iterable[_Row]:
    suffix = PurePosixPath(path).suffix.lower()
    if is_url(path):
        files = None if suffix in _LIST_SUFFIXES else folder_files(path)
        if files is not None:
            return _remote_folder_rows(files)
        content = read_bytes(path)
    elif Path(path).is_dir():
        return _folder_rows(Path(path))
    else:
        content = Path(path).read_bytes()
    if suffix == _PARQUET:
        return _parquet_rows(content, base, columns)
    text = content.decode("utf-8-sig")
    if suffix == ".json":
        return _something_rows(text, base)
    return _csv_rows(text, base, columns)


def _remote_folder_rows(files: Mapping[str, str]) -> Iterable[_Row]:
    for name, url in files.items():
        parts = PurePosixPath(name).parts
        hidden = any(part[0] == "." for part in (parts[0], parts[-1]))
        video = PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES
        if video and len(parts) > 1 and not hidden:
            yield url, parts[0], name


def _folder_rows(folder: Path) -> Iterable[_Row]:
    classes = sorted(each for each in folder.iterdir() if each.is_dir() and each.name[0] != ".")
    if not classes:
        raise DataError("there are no folders in it; make one per class, with its videos inside")
    for each in classes:
        for path in sorted(each.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES and path.name[0] != ".":
                yield str(path), each.name, path.relative_to(folder).as_posix()


def _csv_rows(text: str, base: str, columns: Columns) -> Iterable[_Row]:
    first = next(iter(text.splitlines()), "")
    header = next(csv.reader([first]), [])
    if columns.path in header and columns.label in header:
        yield from _table_rows(text, base, columns)
        return
    comma = "," in first
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        # A path may have spaces, and commas in quotes; the label is what stands last.
        fields = next(csv.reader([line])) if comma else line.rsplit(maxsplit=1)
        if len(fields) != 2 or not all(field.strip() for field in fields):
            form = "`path,label`" if comma else "`path label`"
            raise DataError(f"line {number} is {line[:80]!r}; it must be {form}")
        yield joined(base, fields[0].strip()), fields[1].strip(), fields[0].strip()


def _table_rows(text: str, base: str, columns: Columns) -> Iterable[_Row]:
    table = csv.DictReader(io.StringIO(text, newline=""))
    for row in table:
        path, label = row[columns.path], row[columns.label]
        if not path or not label:
            raise DataError(f"line {table.line_num} has no {columns.path} or no {columns.label}")
        yield joined(base, path), label.strip(), row.get(columns.group) or path


def _parquet_rows(content: bytes, base: str, columns: Columns) -> Iterable[_Row]:
    try:
        from pyarrow import ArrowException, BufferReader
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise DataError(
            f"a Parquet table needs pyarrow, which is not installed ({error})"
        ) from error
    try:
        table = read_table(BufferReader(content))
    except (ArrowException, OSError) as error:
        raise DataError(f"it is no Parquet table: {error}") from error
    missing = {columns.path, columns.label} - set(table.column_names)
    if missing:
        raise DataError(
            f"it has no column {sorted(missing)[0]!r}; it has {', '.join(table.column_names)}. "
            "--columns says which to take"
        )
    wanted = [name for name in columns if name in table.column_names]
    for number, row in enumerate(table.select(wanted).to_pylist(), start=1):
        path, label, group = (row.get(name) for name in columns)
        if path in (None, "") or label in (None, ""):
            raise DataError(f"row {number} has no {columns.path} or no {columns.label}")
        path = str(path)
        yield joined(base, path), str(label).strip(), path if group is None else str(group)


def _something_rows(text: str, base: str) -> Iterable[_Row]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise DataError(f"it is no JSON: {error}") from error
    if not isinstance(entries, list):
        raise DataError('it must be a JSON list of {"id": "1", "template": "Pushing [something]"}')
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or "id" not in entry:
            raise DataError(f"entry {number} has no id")
        name = entry.get("template") or entry.get("label")
        if not isinstance(name, str):
            raise DataError(f"entry {number} has neither template nor label")
        # The label file of the set writes the templates without their brackets.
        name = name.replace("[", "").replace("]", "")
        yield _something_path(base, entry), name, str(entry["id"])


def _something_path(base: str, entry: Mapping[str, Any]) -> str:
    candidates = [joined(base, f"{entry['id']}{suffix}") for suffix in _SOMETHING_SUFFIXES]
    return next((path for path in candidates if Path(path).exists()), candidates[0])


# ---- from labels as they stand there to indices -------------------------------------------------


def _with_indices(rows: list[_Row], labels: Sequence[str] | None) -> VideoList:
    if not rows:
        raise DataError("there are no videos in it")
    names = [label for _, label, _ in rows]
    classes = tuple(labels) if labels is not None else _classes(names)
    by_name = {name: index for index, name in enumerate(classes)}
    samples = tuple(Sample(path, _index(label, by_name), group) for path, label, group in rows)
    return VideoList(samples, classes)


def _classes(names: list[str]) -> tuple[str, ...]:
    if all(name.isdecimal() for name in names):
        return tuple(f"class {index}" for index in range(max(map(int, names)) + 1))
    return tuple(sorted(set(names)))


def _index(label: str, by_name: Mapping[str, int]) -> int:
    if label in by_name:
        return by_name[label]
    if label.isdecimal() and int(label) < len(by_name):
        return int(label)
    known = ", ".join(repr(name) for name in list(by_name)[:3])
    raise DataError(f"{label!r} is none of the {len(by_name)} labels ({known}, ...)")
