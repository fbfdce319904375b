"""Results of jobs as files: whole, bounded, counted, and never in memory."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from service.errors import ResultTooLargeError, SpoolFullError
from service.ingest.spool import Spool
from service.jobs.results import Results
from service.settings import MIB


def run(
    folder: Path,
    case: Callable[[Results, Spool], Awaitable[None]],
    quota: int | None = None,
    most: int = 1000,
) -> None:
    """Runs a case; afterwards no draft is left, and only what is kept is counted."""
    for name in ("incoming", "results"):
        (folder / name).mkdir(exist_ok=True)
    spool = Spool(folder / "incoming", quota)

    async def all_of_it() -> None:
        await case(Results(folder / "results", spool, most), spool)

    asyncio.run(all_of_it())
    kept = sum(file.stat().st_size for file in (folder / "results").iterdir())
    assert spool.used_bytes == kept
    assert list(spool.folder.iterdir()) == []
    spool.close()


async def read(results: Results, job: str) -> bytes:
    stored = await results.open(job)
    assert stored is not None
    content = b"".join([block async for block in stored.blocks])
    assert stored.size == len(content)
    return content


def test_a_draft_that_is_kept_is_the_jobs_result_and_another_is_gone(tmp_path: Path) -> None:
    async def case(results: Results, spool: Spool) -> None:
        with results.draft() as draft:
            await draft.write(b"[")
            with draft.beside() as later:
                await later.write(b"2")
                await later.end()
                await draft.write(b"1,")
                await draft.append(later)
            await draft.write(b"]")
            assert await results.open("a") is None, "before it is whole nobody sees it"
            await results.keep(draft, "a")
        with results.draft() as draft:
            await draft.write(b"[")
        assert await read(results, "a") == b"[1,2]"

    run(tmp_path, case)


def test_a_job_that_is_done_again_has_the_later_result_counted_once(tmp_path: Path) -> None:
    async def case(results: Results, spool: Spool) -> None:
        for text in (b"first, and long", b"second"):
            with results.draft() as draft:
                await draft.write(text)
                await results.keep(draft, "a")
        assert await read(results, "a") == b"second"
        assert spool.used_bytes == len(b"second")
        await results.remove(["a", "nobody"])
        assert spool.used_bytes == 0
        assert await results.open("a") is None

    run(tmp_path, case)


def test_what_is_read_is_read_to_its_end_though_it_is_forgotten_meanwhile(tmp_path: Path) -> None:
    async def case(results: Results, spool: Spool) -> None:
        with results.draft() as draft:
            await draft.write(b"text")
            await results.keep(draft, "a")
        stored = await results.open("a")
        assert stored is not None
        await results.remove(["a"])
        assert [block async for block in stored.blocks] == [b"text"]

    run(tmp_path, case)


def test_one_that_is_too_large_or_finds_no_room_is_refused_as_it_is_written(
    tmp_path: Path,
) -> None:
    async def case(results: Results, spool: Spool) -> None:
        with results.draft() as draft:
            await draft.write(b"x" * 10)
            with pytest.raises(ResultTooLargeError, match="limit of this service"):
                await draft.write(b"x")
        spool.used_bytes += 15  # of videos
        with results.draft() as draft, pytest.raises(SpoolFullError):
            await draft.write(b"x" * 6)
        spool.used_bytes -= 15

    run(tmp_path, case, quota=20, most=10)


def test_a_disk_that_fails_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    async def case(results: Results, spool: Spool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("tempfile.mkstemp", fails)
            with pytest.raises(SpoolFullError), results.draft():
                pass
        with monkeypatch.context() as patch, results.draft() as draft:
            patch.setattr("os.fsync", fails)
            await draft.write(b"x")
            with pytest.raises(SpoolFullError):
                await results.keep(draft, "a")

    run(tmp_path, case)


def test_neither_writing_nor_reading_a_large_one_takes_memory(tmp_path: Path) -> None:
    size, text = 64 * MIB, b"x" * 65_536

    async def case(results: Results, spool: Spool) -> None:
        tracemalloc.start()
        try:
            with results.draft() as draft:
                with draft.beside() as later:
                    for _ in range(size // len(text)):
                        await later.write(text)
                    await later.end()
                    await draft.append(later)
                await results.keep(draft, "a")
            stored = await results.open("a")
            assert stored is not None
            assert sum([len(block) async for block in stored.blocks]) == size
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 8 * MIB

    run(tmp_path, case, most=size)
