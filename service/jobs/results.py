"""Results of jobs, a file each: written as it comes, on the disk before its job is done, counted
with the videos in `max_jobs_bytes`, and sent block by block. None is held in memory whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Container, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from model.files import sync
from service.errors import ResultTooLargeError, SpoolFullError
from service.ingest.spool import Spool, SpoolFile
from service.settings import MIB

logger = logging.getLogger(__name__)
_BLOCK = MIB


class Stored(NamedTuple):
    """A result to be sent."""

    size: int
    blocks: AsyncIterator[bytes]


class Draft:
    """A result that is being written; it is gone at the end of its block unless it is kept."""

    def __init__(self, results: Results, file: SpoolFile, most_bytes: int) -> None:
        self.file = file
        self._results = results
        self._most_bytes = most_bytes

    async def write(self, text: bytes) -> None:
        """Adds to it.

        Raises:
            ResultTooLargeError: it becomes larger than one may be.
            SpoolFullError: there is no room for it.
        """
        if self.file.size + len(text) > self._most_bytes:
            raise ResultTooLargeError(
                f"The result is larger than {self._most_bytes / MIB:,.2f} MiB, the limit of this "
                "service: ask for fewer labels (top_k, threshold) or a longer stride."
            )
        self.file.add(text)
        if self.file.pending > _BLOCK:
            await asyncio.to_thread(self.file.write)

    async def end(self) -> None:
        """Writes what is left, and closes the file.

        Raises:
            SpoolFullError: there is no room for it.
        """
        await asyncio.to_thread(self.file.write)
        self.file.close()

    async def append(self, other: Draft) -> None:
        """Adds all of another one, which has ended.

        Raises:
            ResultTooLargeError, SpoolFullError: as `write`.
        """
        with await asyncio.to_thread(other.file.path.open, "rb") as file:
            async for block in _blocks(file):
                await self.write(block)

    def beside(self) -> contextlib.AbstractContextManager[Draft]:
        """Another one, for what is to be appended later."""
        return self._results.draft()


class Results:
    """The results of one folder.

    Args:
        spool: where drafts are written; it counts their bytes and those of results.
        most_bytes: of one result.
    """

    def __init__(self, folder: Path, spool: Spool, most_bytes: int) -> None:
        self._folder = folder
        self._spool = spool
        self._most_bytes = most_bytes
        self._sizes: dict[str, int] = {}

    def take_stock(self, done: Container[str]) -> None:
        """Counts the results of jobs that are done, and removes what a killed server left."""
        for file in self._folder.iterdir():
            if file.name in done:
                self._count(file.name, file.stat().st_size)
            else:
                file.unlink()

    @contextlib.contextmanager
    def draft(self) -> Iterator[Draft]:
        """A new one.

        Raises:
            SpoolFullError: the disk is full.
        """
        with contextlib.ExitStack() as open_files:
            try:
                file = open_files.enter_context(self._spool.file())
            except OSError as error:
                raise _no_room(error) from error
            yield Draft(self, file, self._most_bytes)

    async def keep(self, draft: Draft, job: str) -> None:
        """Makes a draft the job's result, on the disk when this returns.

        Raises:
            SpoolFullError: the disk is full.
        """
        await draft.end()
        place = self._folder / job
        moving = asyncio.ensure_future(asyncio.to_thread(move_durably, draft.file.path, place))
        try:
            await asyncio.shield(moving)
        except OSError as error:
            raise _no_room(error) from error
        finally:  # a thread cannot be cancelled, and whoever removes the result is to find it
            await asyncio.wait({moving})
        self._count(job, draft.file.size)

    async def open(self, job: str) -> Stored | None:
        """The job's result, if there is one."""
        try:
            file = await asyncio.to_thread((self._folder / job).open, "rb")
        except FileNotFoundError:
            return None
        return Stored(os.fstat(file.fileno()).st_size, _blocks(file))

    async def remove(self, jobs: Iterable[str]) -> None:
        """Forgets the results of jobs that have one."""
        for job in jobs:
            await asyncio.to_thread((self._folder / job).unlink, missing_ok=True)
            self._count(job, 0)

    def _count(self, job: str, size: int) -> None:
        self._spool.used_bytes += size - self._sizes.pop(job, 0)
        if size:
            self._sizes[job] = size


async def _blocks(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        while block := await asyncio.to_thread(file.read, _BLOCK):
            yield block


def move_durably(file: Path, place: Path) -> None:
    """Renames a file that is on the disk when this returns, under its new name."""
    sync(file)
    file.rename(place)
    sync(place.parent)


def _no_room(error: OSError) -> SpoolFullError:
    logger.error("a result cannot be kept", extra={"reason": str(error)})
    return SpoolFullError("There is no room for the result at present.")
