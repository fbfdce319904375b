"""A batcher in virtual time: a clock that jumps, and engines that run when the test says so.

No test here depends on the speed of the machine, and each order of events can be tried.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.runtime.interface import Outputs
from service.inference.batcher import Batcher

Frames = NDArray[np.uint8]
_LIMIT_S = 60.0


def clips(*values: int) -> NDArray[np.uint8]:
    """Tiny clips that each hold one number, up to 65,535."""
    return np.array(values, "<u2").view(np.uint8).reshape(-1, 1, 1, 1, 2)


def values_of(frames: Frames) -> list[int]:
    return [int(value) for value in np.ascontiguousarray(frames).reshape(-1, 2).view("<u2")[:, 0]]


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still while something is to be done, and else jumps."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.now = 0.0
        self.batchers: list[Stepped] = []

    def time(self) -> float:
        return self.now


class _Batch:
    """A job of a batcher in a thread of its own, held where it enters the engine."""

    def __init__(self, job: Callable[[], object], began: threading.Event) -> None:
        self._began = began
        self._gate = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(job,))

    def begin(self) -> None:
        _held.batch = None
        self._thread.start()
        assert self._began.wait(_LIMIT_S)

    def end(self) -> None:
        self._gate.set()
        self._thread.join(_LIMIT_S)

    def _run(self, job: Callable[[], object]) -> None:
        _held.batch = self
        job()
        self._began.set()  # it found nothing to run

    def enter(self) -> None:
        _held.batch = None  # the second time, for one request by itself, it is not held
        self._began.set()
        assert self._gate.wait(_LIMIT_S)


class _Held(threading.local):
    batch: _Batch | None = None


_held = _Held()


class Threads(Executor):
    """What a batcher gave an engine; runs only when the test says so."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.jobs: list[_Batch] = []
        self.running: list[_Batch] = []

    def submit(self, job: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs.append(_Batch(lambda: job(*args, **kwargs), threading.Event()))
        return Future()

    def begin(self) -> bool:
        if not self.jobs or len(self.running) >= self.slots:
            return False
        self.running.append(self.jobs.pop(0))
        self.running[-1].begin()
        return True

    def end(self) -> bool:
        if not self.running:
            return False
        self.running.pop(0).end()
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while wait and (self.end() or self.begin()):
            pass


class SteppedEngine:
    """Answers each clip with its own number and that times two; fails as `fails` says."""

    def __init__(
        self,
        fails: Callable[[list[int]], bool] = lambda batch: False,
        slots: int = 1,
        batches: tuple[int, ...] = (),
    ) -> None:
        self.fails = fails
        self.slots = slots
        self.batches = batches
        self.ran: list[list[int]] = []

    def run(self, frames: Frames) -> Outputs:
        batch = values_of(frames)
        self.ran.append(batch)
        if _held.batch is not None:
            _held.batch.enter()
        if self.fails(batch):
            raise ValueError("the engine fails")
        answers = np.array(batch, np.float32)[:, None]
        return Outputs(answers, answers * 2)


class Stepped:
    """A batcher with stepped engines."""

    def __init__(self, *engines: SteppedEngine, **options: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.batchers.append(self)
        self.loop = loop
        self.engines = engines
        self.threads: list[Threads] = []

        def threads(slots: int) -> Threads:
            self.threads.append(Threads(slots))
            return self.threads[-1]

        options = {"max_batch": 4, "max_queue": 1000, "threads": threads, **options}
        self.batcher = Batcher(engines, **options)
        self.batcher.start()

    async def turn(self) -> None:
        """Lets the event loop do all that it can without time passing."""
        for _ in range(8):
            await asyncio.sleep(0)

    async def begin(self, engine: int = 0) -> bool:
        """Starts the next batch of an engine, if it was given one."""
        await self.turn()
        return self.threads[engine].begin()

    async def end(self, engine: int = 0) -> bool:
        """Ends the oldest batch that an engine is at."""
        ended = self.threads[engine].end()
        await self.turn()
        return ended

    async def step(self, engine: int = 0) -> bool:
        """Runs the next batch of an engine, if it was given one."""
        return await self.begin(engine) and await self.end(engine)

    async def wait(self, seconds: float) -> None:
        self.loop.now += seconds
        await self.turn()

    async def finish(self) -> None:
        """Runs until no engine has work any more, over all settling."""
        while True:
            engines = range(len(self.engines))
            worked = [await self.end(index) or await self.step(index) for index in engines]
            if not any(worked):
                await self.wait(1.0)
                if not any(threads.jobs for threads in self.threads):
                    return

    def release(self) -> None:
        """Ends the batches that a test has left in the engines."""
        for threads in self.threads:
            threads.shutdown()


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test, which is a coroutine function, in virtual time."""

    @functools.wraps(test)
    def in_virtual_time(*arguments: Any, **keywords: Any) -> None:
        loop = VirtualLoop()
        loop.set_exception_handler(lambda loop, context: None)  # refusals that no test reads

        async def run() -> None:
            try:
                await test(*arguments, **keywords)
            finally:
                for batcher in loop.batchers:
                    batcher.release()
                left = asyncio.all_tasks() - {asyncio.current_task()}
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

        try:
            loop.run_until_complete(run())
        finally:
            loop.close()

    return in_virtual_time
