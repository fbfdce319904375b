"""Several workers: started, watched, replaced when one dies or hangs, stopped; metrics as one's.

The process that starts them has the engines, one a device whatever the number of workers. They end
with it: a worker whose starter is gone is killed by the kernel. Each worker has a listening socket
of its own, which stays open while the worker is replaced: who connects meanwhile waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from service import merging, worker
from service.auth import Keyring
from service.listening import bind, url_of
from service.merging import Sample
from service.metrics import Metrics
from service.network import LocalNetwork
from service.sessions import Sessions
from service.settings import Settings, SettingsError
from service.spool import Spool
from service.wire import Wire
from service.worker import Post

logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 300.0
# Beyond the grace of its requests, before a worker is killed.
_END_S = 5.0
_SCRAPE_TIMEOUT_S = 2.0
# How often each is asked for its metrics, whether or not anybody scrapes: so it is noticed when one
# hangs, and what it counted is lost for the time since at most when one dies.
_ASK_EVERY_S = 10.0
# One that does not answer for so long hangs: as long, nobody who is connected to it had an answer.
_SILENCE_S = 60.0
# Before a worker that died young is replaced, and twice as long after each further one.
_RETRY_S = 0.5
_LONGEST_RETRY_S = 30.0
_YOUNG_S = 10.0
_LONGEST_PATH = 107  # of a Unix socket, see unix(7)


class Workers:
    """The workers of one service.

    Args:
        spool: the sockets of this process are in its folder.

    Raises:
        SettingsError: the spool's folder has too long a name for that.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        network: LocalNetwork,
        keyring: Keyring | None,
        spool: Spool,
    ) -> None:
        self.forwarding = spool.folder / "http"
        """Where the rest of the service is to listen."""
        self._asking = spool.folder / "ask"
        if len(os.fsencode(self.forwarding)) > _LONGEST_PATH:
            raise SettingsError(
                f"TIMESFORMER_SPOOL_DIR: {settings.spool_dir} is too long a path for the sockets "
                f"between several workers, which may have {_LONGEST_PATH} bytes"
            )
        self._settings = settings
        self._metrics = metrics
        self._sessions = Sessions(network, keyring)
        self._workers: list[_Worker] = []
        self._departed: list[Sample] = []
        metrics.workers.set_function(lambda: sum(each.is_ready for each in self._workers))

    async def start(self) -> str:
        """Starts them, and returns the service's URL once all of them listen.

        Raises:
            SettingsError: the port is taken; or a worker does not start, and why.
        """
        began = time.perf_counter()
        settings = self._settings
        bound = bind(settings.host, settings.port, settings.workers)
        await self._sessions.open(self._asking)
        for number, listeners in enumerate(bound):
            post = Post(
                os.getpid(),
                settings.of_worker(number),
                listeners,
                asking=self._asking,
                forwarding=self.forwarding,
            )
            self._workers.append(_Worker(number, post, self._note_death))
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await asyncio.gather(*(each.begin() for each in self._workers))
        except TimeoutError:
            reason = f"they do not start within {_START_TIMEOUT_S:g} s; the log says why"
            raise SettingsError(f"TIMESFORMER_WORKERS: {reason}") from None
        self._metrics.start_seconds.labels("workers").set(time.perf_counter() - began)
        return url_of(bound[0][0])

    def tell_stopping(self) -> None:
        """From here on clients are asked to go elsewhere."""
        for each in self._workers:
            each.tell_stopping()

    async def stop(self) -> None:
        """Takes no new requests, and ends the workers once theirs are answered or cut off."""
        limit_s = self._settings.shutdown_grace_s + _END_S
        await asyncio.gather(*(each.stop(limit_s) for each in self._workers))

    async def close(self) -> None:
        """Ends at once what `stop` has not ended."""
        await asyncio.gather(*(each.stop(0) for each in self._workers))
        await self._sessions.close()

    async def render(self) -> bytes:
        """The metrics of the whole service."""
        asked = [each.ask_metrics() for each in self._workers if each.is_ready]
        if asked:
            # What one that does not answer in time said before is the best that is known of it.
            await asyncio.wait(asked, timeout=_SCRAPE_TIMEOUT_S)
        known = [each.samples for each in self._workers]
        return merging.render(self._metrics.registry, [self._departed, *known])

    def _note_death(self, dead: _Worker, status: int | None) -> None:
        counted = [*self._departed, *dead.samples]
        self._departed = merging.counted(counted, self._metrics.registry)
        self._metrics.worker_restarts.inc()
        facts = {"worker": dead.number, "status": status}
        logger.error("a worker ended and is replaced", extra=facts)


class _Worker:
    """One of them; its process is another one after each death."""

    def __init__(
        self, number: int, post: Post, on_death: Callable[[_Worker, int | None], None]
    ) -> None:
        self.number = number
        self.samples: list[Sample] = []
        """What its present process has last said of its metrics."""
        self.is_ready = False
        """Whether its present process listens."""
        self._post = post
        self._on_death = on_death
        self._process: BaseProcess | None = None
        self._wire: Wire | None = None
        self._stopping = asyncio.Event()
        self._told_stopping = False
        self._came_up = asyncio.Event()
        self._asked: asyncio.Future[None] | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Starts a process, and others after it until `stop`; back once the first one listens.

        Raises:
            SettingsError: it does not come so far.
        """
        self._task = asyncio.create_task(self._keep_up(), name=f"worker {self.number}")
        await self._ready

    def tell_stopping(self) -> None:
        self._told_stopping = True
        self._order("stopping")

    def ask_metrics(self) -> asyncio.Future[None]:
        """Done once `samples` are new, or it is gone."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().create_future()
            self._order("metrics")
        return self._asked

    async def stop(self, limit_s: float) -> None:
        """Lets its process end, and kills it after a while."""
        self._stopping.set()
        self._order("stop")
        for listener in self._post.listeners:
            listener.close()
        if self._task is None:
            return
        await asyncio.wait([self._task], timeout=limit_s)
        if self._process is not None:
            if limit_s > 0:
                facts = {"worker": self.number}
                logger.error("a worker is killed, as it does not end", extra=facts)
            self._process.kill()
        await asyncio.gather(self._task, return_exceptions=True)

    def _order(self, order: str) -> None:
        if self._wire is not None and not self._wire.lost:
            self._wire.send({"order": order})

    async def _keep_up(self) -> None:
        retry_s = _RETRY_S
        while not self._stopping.is_set():
            started = time.monotonic()
            status = await self._live()
            if self._stopping.is_set():
                return
            if not self._ready.done():
                reason = f"a worker ended with {status} before it was ready; the log says why"
                self._ready.set_exception(SettingsError(f"TIMESFORMER_WORKERS: {reason}"))
            if self._ready.exception() is not None:
                return
            self._on_death(self, status)
            self.samples = []
            if time.monotonic() - started > _YOUNG_S:
                retry_s = _RETRY_S
                continue
            # It may not come up soon: who connects is to find another worker, not to wait.
            for listener in self._post.listeners:
                with contextlib.suppress(OSError):  # it did not listen
                    listener.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), retry_s)
            retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    async def _live(self) -> int | None:
        """One process, from its start to its end; returns its status."""
        ours, theirs = socket.socketpair()
        with theirs:
            # Spawned, not forked: a fork of a process with engine threads and GPUs is a trap.
            # By this thread, which lasts: to the kernel it is the parent that the worker ends with.
            context = multiprocessing.get_context("spawn")
            process = context.Process(
                target=worker.main, args=(self._post, theirs), name=f"worker {self.number}"
            )
            try:
                process.start()
            except OSError:
                logger.exception("a worker cannot be started", extra={"worker": self.number})
                ours.close()
                return None
        self._process = process
        loop = asyncio.get_running_loop()
        _, self._wire = await loop.create_unix_connection(Wire, sock=ours)
        if self._stopping.is_set():
            self._order("stop")
        self._came_up.clear()
        watching = loop.create_task(self._watch(process), name=f"watch on worker {self.number}")
        try:
            while True:
                self._hear(**(await self._wire.receive()).head)
        except ConnectionError:
            self.is_ready = False
        watching.cancel()
        self._have_samples(self.samples)
        self._process = None
        await asyncio.to_thread(_reap, process)
        return process.exitcode

    async def _watch(self, process: BaseProcess) -> None:
        """Kills a process that does not come up, or does not answer any more."""
        try:
            await asyncio.wait_for(self._came_up.wait(), _START_TIMEOUT_S)
            while True:
                await asyncio.sleep(_ASK_EVERY_S)
                async with asyncio.timeout(_SILENCE_S):
                    await asyncio.shield(self.ask_metrics())
        except TimeoutError:
            if not self._stopping.is_set():  # else `stop` has a limit of its own
                logger.error("a worker hangs and is killed", extra={"worker": self.number})
                process.kill()

    def _hear(
        self,
        ready: bool = False,
        failed: str | None = None,
        samples: list[list[Any]] | None = None,
    ) -> None:
        if samples is not None:
            self._have_samples([Sample(*sample) for sample in samples])
        if ready:
            self.is_ready = True
            self._came_up.set()
            if self._told_stopping:
                self._order("stopping")
            if not self._ready.done():
                self._ready.set_result(None)
        if failed is not None:
            if self._ready.done():  # as the first one it came up; there is nobody to tell but these
                facts = {"worker": self.number, "reason": failed}
                logger.error("a worker does not start", extra=facts)
            else:
                self._ready.set_exception(SettingsError(failed))

    def _have_samples(self, samples: list[Sample]) -> None:
        self.samples = samples
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(None)


def _reap(process: BaseProcess) -> None:
    """It has hung up, and ends."""
    process.join(_END_S)
    process.kill()
    process.join()
