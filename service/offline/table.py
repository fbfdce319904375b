"""The table of labels, written in blocks: a run that is killed loses one block at most.

While a run goes on, its rows lie in `OUT.parts/`, one Parquet file a block, each written beside and
renamed. At the end they become `OUT`, with what stood there before, and `OUT` less its suffix plus
`.errors.parquet` lists the videos without labels. Every file says in its metadata by what rules its
rows were made; rows of other rules are refused. Rows are in no particular order.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from model.files import LockTakenError, lock_folder, replacing
from service.offline.errors import LabellingError
from service.offline.rows import Row, Rules

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.string()),
        ("score", pa.float64()),
        ("labels", pa.list_(pa.string())),
        ("class_indices", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float64())),
        ("duration_s", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("rotation", pa.int32()),
        ("frames", pa.int64()),
        ("frame_rate", pa.float64()),
        ("codec", pa.string()),
        ("container", pa.string()),
        ("truncated", pa.bool_()),
        ("sampling", pa.string()),
        ("views", pa.int32()),
        ("crops", pa.int32()),
        ("times_s", pa.list_(pa.list_(pa.float64()))),
        ("model_name", pa.string()),
        ("model_version", pa.string()),
        ("error_code", pa.string()),
        ("error_detail", pa.string()),
    ]
)
_ERROR_COLUMNS = ["path", "error_code", "error_detail", "model_name", "model_version"]
_RULES = b"timesformer.rules"


class LabelTable:
    """Rows that are added one by one, and what earlier runs left. Used as a context.

    Args:
        out: the table, a `.parquet`.
        rules: of the rows that are to come.
        block: rows of a part.
        again: videos that failed in an earlier run are not done.

    Raises:
        LabellingError: what is there was made by other rules, is no such table, or another run is
            writing it; a file cannot be written.
    """

    def __init__(self, out: Path, rules: Rules, block: int, again: bool = False) -> None:
        if out.suffix != ".parquet":
            raise LabellingError(f"--out {out}: the table is Parquet, so name it NAME.parquet")
        self.out = out
        self.errors = out.with_name(f"{out.stem}.errors.parquet")
        self.parts = out.with_name(f"{out.name}.parts")
        self._schema = SCHEMA.with_metadata({_RULES: json.dumps(dataclasses.asdict(rules))})
        self._rules = rules
        self._block = block
        self._again = again
        self._rows: list[Row] = []
        self._lock = ExitStack()
        self.done: set[str] = set()
        """Names of the videos that need no more work."""

    def __enter__(self) -> Self:
        with _writing(self.parts):
            self.parts.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.enter_context(lock_folder(self.parts, wait=False))
            except LockTakenError:
                raise LabellingError(f"another run is writing {self.out}") from None
        try:
            for file in self._files():
                self._check(file)
                rows = pq.read_table(file, columns=["path", "error_code"])
                for name, code in zip(*rows.to_pydict().values(), strict=True):
                    if code is None or not self._again:
                        self.done.add(name)
            for beside in self.parts.glob(".*.tmp"):
                beside.unlink()
            self._next = max((int(part.stem) for part in self._part_files()), default=0) + 1
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()  # also on Ctrl-C: what is done stays done
        finally:
            self._leave()

    def _leave(self) -> None:
        if self.parts.is_dir() and not any(self.parts.iterdir()):
            self.parts.rmdir()
        self._lock.close()

    def add(self, row: Row) -> None:
        """Takes a row; writes a part when a block is full. A second row of a video is let go."""
        if row["path"] in self.done:
            return
        self.done.add(row["path"])
        self._rows.append(row)
        if len(self._rows) >= self._block:
            self.flush()

    def flush(self) -> None:
        """Writes what is left of a block."""
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        with _replacing(self.parts / f"{self._next:08}.parquet", self._schema) as write:
            write(table)
        self._next += 1
        self._rows = []

    def finish(self) -> tuple[int, int]:
        """Makes the parts one table, and the table of errors; (videos in all, failed).

        Killed at any moment, the next run finds the rows in the old table, in the parts, or in
        both, and the newest row of a video counts.
        """
        self.flush()
        if self._part_files() or not (self.out.exists() and self.errors.exists()):
            self._merge()
        shutil.rmtree(self.parts)
        return pq.read_metadata(self.out).num_rows, pq.read_metadata(self.errors).num_rows

    def _merge(self) -> None:
        files = self._files()
        newest: dict[str, Path] = {}
        for file in files:
            newest.update(dict.fromkeys(_column(file, "path"), file))
        errors = pa.schema([self._schema.field(name) for name in _ERROR_COLUMNS])
        with (
            _replacing(self.out, self._schema) as write,
            _replacing(self.errors, errors.with_metadata(self._schema.metadata)) as write_error,
        ):
            for file in files:
                for group in pq.ParquetFile(file).iter_batches():
                    rows = pa.Table.from_batches([group]).cast(self._schema)
                    kept = [newest[name] == file for name in rows["path"].to_pylist()]
                    rows = rows.filter(pa.array(kept, pa.bool_()))
                    write(rows)
                    write_error(rows.filter(rows["error_code"].is_valid()).select(_ERROR_COLUMNS))

    def _part_files(self) -> list[Path]:
        return sorted(self.parts.glob("[0-9]*.parquet"))

    def _files(self) -> list[Path]:
        """What earlier runs finished, then the parts, the newest last."""
        return [*([self.out] if self.out.exists() else []), *self._part_files()]

    def _check(self, file: Path) -> None:
        """Refuses what is no table of these rules."""
        try:
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowException) as error:
            raise LabellingError(f"{file} is no Parquet table ({error}): move it away") from error
        theirs = json.loads((schema.metadata or {}).get(_RULES, b"null"))
        if theirs is None or schema.names != SCHEMA.names:
            raise LabellingError(
                f"{file} is no table of this version of `timesformer label`: take another --out"
            )
        ours = dataclasses.asdict(self._rules)
        changed = [key for key in ours if theirs.get(key) != ours[key]]
        if changed:
            differences = ", ".join(f"{key} {theirs.get(key)} (now {ours[key]})" for key in changed)
            raise LabellingError(
                f"{file} was made with {differences}: rows of different rules do not go into one "
                "table; take another --out, or the same rules"
            )


def _column(file: Path, name: str) -> list[Any]:
    return list(pq.read_table(file, columns=[name])[name].to_pylist())


@contextmanager
def _replacing(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Gives a function that writes rows; the file appears, whole and synced, at the end."""
    with (
        _writing(path),
        replacing(path, durable=True) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        yield lambda rows: writer.write_table(rows) if rows.num_rows else None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LabellingError(f"cannot write {path}: {error.strerror or error}") from error
