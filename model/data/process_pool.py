"""Work on many files in processes: answers in order, and a file that kills its process is named.

A decoder is C code that reads what strangers wrote. When it crashes, the pool is broken and nobody
knows by which file; those that were under way are then tried again, each in a process of its own.
"""

from __future__ import annotations

import collections
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from model.processes import die_with_parent

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_AHEAD = 4  # items under way per process; more only costs memory


def in_processes(
    function: Callable[[Item], Answer],
    items: Iterable[Item],
    processes: int,
    crashed: Callable[[Item], Answer],
) -> Iterator[Answer]:
    """`map(function, items)` over processes, in order, at most a few items ahead.

    Args:
        function, items, answers: picklable; what `function` raises is raised here.
        processes: 0 works in this process.
        crashed: what to answer for an item whose process died.
    """
    if processes == 0:
        yield from map(function, items)
        return
    remaining = iter(items)
    window: collections.deque[tuple[Item, Future[Answer] | None]] = collections.deque()
    pool = _pool(processes)
    try:
        while True:
            for item in itertools.islice(remaining, processes * _AHEAD - len(window)):
                window.append((item, _submit(pool, function, item)))
            if not window:
                return
            try:
                answer = _answer(window[0][1])
            except BrokenProcessPool:
                pool.shutdown()
                doubtful = [item for item, _ in window]
                window.clear()
                for item in doubtful:
                    yield _alone(function, item, crashed)
                pool = _pool(processes)
                continue
            window.popleft()
            yield answer
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, function: Callable[[Item], Answer], item: Item
) -> Future[Answer] | None:
    """None where the pool has broken already."""
    try:
        return pool.submit(function, item)
    except BrokenProcessPool:
        return None


def _answer(future: Future[Answer] | None) -> Answer:
    if future is None:
        raise BrokenProcessPool
    return future.result()


def _alone(
    function: Callable[[Item], Answer], item: Item, crashed: Callable[[Item], Answer]
) -> Answer:
    with _pool(1) as pool:
        try:
            return pool.submit(function, item).result()
        except BrokenProcessPool:
            return crashed(item)


def _pool(processes: int) -> ProcessPoolExecutor:
    # Spawned, as a fork of a process with threads may inherit a lock that nobody releases.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, initializer=die_with_parent)
