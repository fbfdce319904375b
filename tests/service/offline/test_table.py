"""The table of labels: whole or not there, complete whenever it was killed, of one kind of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.offline import table as table_module
from service.offline.errors import LabellingError
from service.offline.rows import Row, Rules
from service.offline.table import SCHEMA, LabelTable

RULES = Rules("colours", "1", "ab" * 32, "float32", views=1, crops=1, top_k=5)


def row(name: str, **changes: object) -> Row:
    return {"path": name, "label": "red", "score": 0.5, "labels": ["red"], **changes}


def bad(name: str) -> Row:
    return {"path": name, "error_code": "empty_file", "error_detail": "It is empty."}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "labels.parquet"


def written(out: Path) -> dict[str, Row]:
    rows = pq.read_table(out).to_pylist()
    assert len({item["path"] for item in rows}) == len(rows)
    return {item["path"]: item for item in rows}


def label(out: Path, rows: list[Row], block: int = 2, again: bool = False) -> tuple[int, int]:
    with LabelTable(out, RULES, block, again) as table:
        for item in rows:
            table.add(item)
        return table.finish()


def test_rows_become_one_table_and_failures_a_table_of_their_own(out: Path) -> None:
    assert label(out, [row("a"), bad("b"), row("c")]) == (3, 1)
    assert written(out).keys() == {"a", "b", "c"}
    assert written(out)["a"]["labels"] == ["red"]
    assert written(out)["b"]["label"] is None
    (error,) = pq.read_table(out.with_name("labels.errors.parquet")).to_pylist()
    assert (error["path"], error["error_code"]) == ("b", "empty_file")
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "labels.errors.parquet",
        "labels.parquet",
    ]


def test_a_run_that_ends_early_keeps_what_it_did(out: Path) -> None:
    def interrupted() -> None:
        with LabelTable(out, RULES, 2) as table:
            for name in "abc":
                table.add(row(name))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with LabelTable(out, RULES, 2) as table:
        assert table.done == {"a", "b", "c"}
    assert not out.exists()


def test_a_run_that_is_killed_loses_less_than_a_block(out: Path) -> None:
    killed = LabelTable(out, RULES, 2).__enter__()
    for name in "abcde":
        killed.add(row(name))
    assert len(list(killed.parts.glob("*.parquet"))) == 2
    killed._leave()  # what the kernel does for a process that is gone: the lock is free
    with LabelTable(out, RULES, 2) as table:
        assert table.done == {"a", "b", "c", "d"}


def test_a_later_run_adds_what_is_new(out: Path) -> None:
    label(out, [row("a"), row("b")])
    with LabelTable(out, RULES, 2) as table:
        assert table.done == {"a", "b"}
        table.add(row("a", score=0.1))
        table.add(row("c"))
        assert table.finish() == (3, 0)
    assert written(out)["a"]["score"] == 0.5


def test_failures_are_done_unless_they_are_wanted_again(out: Path) -> None:
    label(out, [row("a"), bad("b"), bad("c")])
    with LabelTable(out, RULES, 2) as table:
        assert table.done == {"a", "b", "c"}
    assert label(out, [row("b"), bad("c")], again=True) == (3, 1)
    assert written(out)["b"]["label"] == "red"
    assert written(out)["b"]["error_code"] is None


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_a_run_that_is_killed_while_it_finishes_loses_and_doubles_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    """Before the errors are replaced, before the table is, and before the parts are removed."""
    label(out, [row("a"), bad("b")])

    class Killed(BaseException):
        pass

    done = 0
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal done
        if "parts" not in str(target):
            if done == replaced:
                raise Killed
            done += 1
        return real(self, target)

    def remove(path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(table_module.shutil, "rmtree", remove)
        with pytest.raises(Killed):
            label(out, [row("b"), row("c")], again=True)
    assert label(out, [row("d")]) == (4, 0)
    assert written(out).keys() == {"a", "b", "c", "d"}
    assert written(out)["b"]["label"] == "red"


@pytest.mark.parametrize("change", [{"version": "2"}, {"views": 3}, {"precision": "int8"}])
def test_rows_of_other_rules_are_refused(out: Path, change: dict[str, object]) -> None:
    label(out, [row("a")])
    before = out.read_bytes()
    rules = dataclasses.replace(RULES, **change)
    with pytest.raises(LabellingError, match=f"was made with {next(iter(change))}"):
        LabelTable(out, rules, 2).__enter__()
    assert out.read_bytes() == before
    assert not out.with_name("labels.parquet.parts").exists()


def test_another_table_is_never_overwritten(out: Path) -> None:
    pq.write_table(pa.table({"path": ["a"]}), out)
    with pytest.raises(LabellingError, match="is no table of this version"):
        LabelTable(out, RULES, 2).__enter__()
    out.write_bytes(b"words")
    with pytest.raises(LabellingError, match="is no Parquet table"):
        LabelTable(out, RULES, 2).__enter__()


def test_two_runs_do_not_write_one_table(out: Path) -> None:
    with LabelTable(out, RULES, 2) as first:
        with pytest.raises(LabellingError, match="another run is writing"):
            LabelTable(out, RULES, 2).__enter__()
        first.add(row("a"))
        assert first.finish() == (1, 0)


def test_the_name_of_the_table_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(LabellingError, match="name it NAME"):
        LabelTable(tmp_path / "labels.csv", RULES, 2)


def test_a_full_disk_is_one_sentence_and_what_was_written_stays(
    out: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    with LabelTable(out, RULES, 1) as table:
        table.add(row("a"))
    with full_disk(1000), pytest.raises(LabellingError, match="cannot write"):
        label(out, [row("b" * 5000)], block=1)
    with LabelTable(out, RULES, 1) as table:
        assert table.done == {"a"}


def test_the_columns_are_those_of_the_rows() -> None:
    assert set(row("a")) | set(bad("b")) <= set(SCHEMA.names)
