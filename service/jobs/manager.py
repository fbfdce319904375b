"""Jobs: long videos that are accepted now and done later, whatever happens to the server meanwhile.

A video is on the disk and its job in the database before it is accepted (202). A job that ran when
its server ended, by whatever means, is done again from its start; three times at most. One that the
service has no room or means for at the moment is put off, for a day at most.

    TIMESFORMER_JOBS_DIR/jobs.sqlite   states
                         videos/ID     until the job has ended
                         results/ID    of a job that is done
                         incoming/     being received or written
                         lock          held by the one server that uses the folder
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError

from model.files import lock_file
from service.errors import (
    InternalError,
    JobAbandonedError,
    JobNotDoneError,
    JobNotFoundError,
    JobsFullError,
    RequestTimeoutError,
    ServiceError,
    SpoolFullError,
    UploadTimeoutError,
)
from service.ingest.spool import Spool
from service.ingest.url_sources import Sources
from service.jobs import runner
from service.jobs.results import Results, Stored, move_durably
from service.jobs.runner import Means, Progress
from service.jobs.store import STATES, JobStore, NewJob, StoredJob, TooManyWaitError
from service.jobs.webhooks import AT_ONCE, Webhooks, wait_after
from service.observability.metrics import Metrics
from service.settings import MIB, Settings, SettingsError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_MOST_ATTEMPTS = 3
_MOST_WAITING = 1000
_MOST_RESULT_BYTES = 256 * MIB
_TIDY_EVERY_S = 600.0
_RETRY_STORE_S = 5.0
# A job is put off for 5 s, then twice as long each time, ten minutes at most, and that for a day.
_FIRST_DELAY_S, _LONGEST_DELAY_S, _MOST_DELAYS = 5.0, 600.0, 150


class Jobs:
    """The jobs of one folder.

    Args:
        hook_body: what a webhook is told of a job.

    Raises:
        SettingsError: the folder cannot be used, or another server uses it.
    """

    def __init__(
        self,
        folder: Path,
        means: Means,
        metrics: Metrics,
        sources: Sources,
        hook_body: Callable[[StoredJob], bytes],
    ) -> None:
        self._settings: Settings = means.settings
        self._means = means
        self._metrics = metrics
        self._sources = sources
        self._hook_body = hook_body
        self._webhooks = Webhooks(means.settings)
        self._lock = contextlib.ExitStack()
        self._videos = folder / "videos"
        incoming = folder / "incoming"
        try:
            for each in (folder, self._videos, folder / "results", incoming):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.enter_context(lock_file(folder / "lock", wait=False, mode=0o600))
            self._store = JobStore(folder / "jobs.sqlite")
        except (OSError, sqlite3.Error) as error:
            raise SettingsError(f"TIMESFORMER_JOBS_DIR: {folder} cannot be used: {error}") from None
        self.incoming = Spool(incoming, self._settings.max_jobs_bytes)
        self._results = Results(folder / "results", self.incoming, _MOST_RESULT_BYTES)
        # The one thread that uses the database.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._wake = asyncio.Event()
        self._wake_hooks = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self.progress: dict[str, Progress] = {}
        """Of the timelines that run."""
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Takes up what an earlier server left."""
        await self._means.decoders.start()
        error = _error_of(
            JobAbandonedError(f"The service ended {_MOST_ATTEMPTS} times while it ran this job.")
        )
        await self._db(lambda store: store.recover(_MOST_ATTEMPTS, error, time.time()))
        needed = await self._db(JobStore.unfinished)
        for video in self._videos.iterdir():
            if video.name not in needed:
                video.unlink()
        self.incoming.used_bytes += sum(needed.values())
        self._results.take_stock(await self._db(JobStore.done))
        self._metrics.jobs_bytes.set_function(lambda: self.incoming.used_bytes)
        await self._count()
        loops = [self._work_on() for _ in range(self._settings.job_workers)]
        self._tasks = [
            asyncio.create_task(loop) for loop in (*loops, self._call_webhooks(), self._tidy())
        ]
        self._wake.set()

    async def close(self) -> None:
        """Stops; what runs is done from its start by the next server."""
        for task in (*self._tasks, *self._running.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._running.values(), return_exceptions=True)
        with contextlib.suppress(sqlite3.Error):  # then the next server finds it as after a kill
            await self._db(JobStore.give_back)
        self._means.decoders.close()
        await self._db(JobStore.close)
        self._thread.shutdown()
        self._webhooks.close()
        self.incoming.close()
        self._lock.close()

    async def find_repeated(self, owner: str, idempotency: str | None) -> StoredJob | None:
        """The job of an earlier request with the same idempotency key."""
        return await self._asked(lambda store: store.find_repeated(owner, idempotency))

    def check_webhook(self, url: str | None) -> None:
        """Raises `WebhookRefusedError` if this URL will not be called."""
        if url is not None:
            self._webhooks.check(url)

    async def refuse_if_full(self) -> None:
        """Raises `JobsFullError` if so many wait that no more are taken."""
        counts = await self._asked(JobStore.counts)
        if counts["queued"] >= _MOST_WAITING:
            raise _full()

    async def add(
        self,
        video: Path | None,
        size: int,
        *,
        owner: str,
        idempotency: str | None,
        kind: str,
        parameters: Mapping[str, Any],
        source: str | None,
        webhook: str | None,
    ) -> StoredJob:
        """Accepts a job; its video, a file of `incoming`, is taken over.

        Raises:
            JobsFullError: so many wait that no more are taken.
            SpoolFullError: the disk is full.
        """
        job = NewJob(
            f"job_{secrets.token_hex(16)}",
            owner,
            idempotency,
            kind,
            parameters,
            source,
            size,
            webhook,
        )
        place = self._videos / job.id
        try:
            if video is not None:
                await asyncio.to_thread(move_durably, video, place)
            stored = await self._db(lambda store: store.add(job, _MOST_WAITING, time.time()))
        except TooManyWaitError:
            place.unlink(missing_ok=True)
            raise _full() from None
        except (OSError, sqlite3.OperationalError) as error:
            place.unlink(missing_ok=True)
            logger.error("a job cannot be kept", extra={"reason": str(error)})
            raise SpoolFullError("There is no room for the job at present.") from error
        if stored.id != job.id:  # another request with the same key was quicker
            place.unlink(missing_ok=True)
            return stored
        self.incoming.used_bytes += size
        await self._count()
        self._wake.set()
        return stored

    async def find(self, identifier: str, owner: str | None) -> StoredJob:
        """A job of an owner, or of anyone for None.

        Raises:
            JobNotFoundError: there is none.
        """
        try:
            job = await self._asked(lambda store: store.get(identifier))
        except KeyError:
            job = None
        if job is None or (owner is not None and job.owner != owner):
            raise JobNotFoundError("There is no such job.")
        return job

    async def page(self, owner: str | None, before: str | None, limit: int) -> list[StoredJob]:
        """Jobs before another one, newest first.

        Raises:
            JobNotFoundError: there is no such other one.
        """
        seq = None if before is None else (await self.find(before, owner)).seq
        return await self._asked(lambda store: store.page(owner, seq, limit))

    async def result(self, job: StoredJob) -> Stored:
        """The JSON of what came of a job.

        Raises:
            JobNotDoneError: nothing, or not yet.
            JobNotFoundError: it was forgotten a moment ago.
            ServiceError: what the job failed with.
        """
        if job.error is not None:
            raise _as_error(job.error)
        if job.state != "done":
            raise JobNotDoneError(f"The job is {job.state}.")
        stored = await self._results.open(job.id)
        if stored is None:
            raise JobNotFoundError("There is no such job any more.")
        return stored

    async def cancel(self, job: StoredJob) -> StoredJob:
        """Ends a job that has no result yet; one that has ended is forgotten, with its result.

        Raises:
            SpoolFullError: the disk is full; nothing has changed.
        """
        if await self._asked(lambda store: store.cancel(job.id, time.time())):
            if task := self._running.get(job.id):
                task.cancel()
                await asyncio.wait({task})
                await self._results.remove([job.id])  # it may have been kept and not yet told
            self._metrics.jobs_ended.labels(job.kind, "cancelled").inc()
            await self._ended(job)
            return await self.find(job.id, None)
        job = await self.find(job.id, None)
        await self._asked(lambda store: store.remove(job.id))
        await self._results.remove([job.id])
        await self._count()
        return job

    async def _work_on(self) -> None:
        """Does one job after the other; sleeps while there is none."""
        while True:
            self._wake.clear()
            job = await self._patiently(lambda store: store.claim(time.time()))
            if job is None:
                await _until(self._wake, await self._patiently(JobStore.next_due))
                continue
            # At once: whoever cancels the job from here on finds what to cancel.
            task = self._running[job.id] = asyncio.create_task(self._do(job))
            try:
                self._wake.set()  # there may be more, for the others
                await self._count()
                await asyncio.wait({task})
            finally:
                task.cancel()
                self._running.pop(job.id, None)
                self.progress.pop(job.id, None)

    async def _do(self, job: StoredJob) -> None:
        started = time.monotonic()
        error = await self._try(job)
        if error is not None:
            await self._results.remove([job.id])  # the time may be over when it is kept already
        if error is not None and error.status == 503 and job.delays < _MOST_DELAYS:
            await self._put_off(job, error)
            return
        failure = None if error is None else _error_of(error)
        if await self._patiently(lambda store: store.finish(job, time.time(), failure)):
            state = "done" if error is None else "failed"
            self._metrics.jobs_ended.labels(job.kind, state).inc()
            self._metrics.job_seconds.labels(job.kind).observe(time.monotonic() - started)
            await self._ended(job)
        else:
            await self._results.remove([job.id])

    async def _try(self, job: StoredJob) -> ServiceError | None:
        """Makes the job's result; returns what it failed with."""
        try:
            async with asyncio.timeout(self._settings.timeline_timeout_s):
                async with self._video(job) as video:
                    parameters = runner.parse(
                        job.kind, job.parameters, self._settings.max_clips_per_request
                    )
                    on_progress = functools.partial(self.progress.__setitem__, job.id)
                    with self._results.draft() as draft:
                        await runner.do(parameters, video, self._means, draft, on_progress)
                        await self._results.keep(draft, job.id)
        except ServiceError as problem:
            return problem
        except RequestValidationError as problem:  # they fitted the model that served then
            error = ServiceError("; ".join(str(item["msg"]) for item in problem.errors()))
            error.status, error.code = 422, "invalid_parameters"
            return error
        except TimeoutError:
            return RequestTimeoutError("The job took longer than one may.")
        except Exception:
            logger.exception("a job broke", extra={"job": job.id})
            return InternalError("Something broke on our side; the log has more.")
        return None

    async def _put_off(self, job: StoredJob, error: ServiceError) -> None:
        """Queues a job again that the service can do nothing for at the moment."""
        delay = min(_FIRST_DELAY_S * 2**job.delays, _LONGEST_DELAY_S)
        if await self._patiently(lambda store: store.put_off(job, time.time() + delay)):
            self._metrics.jobs_put_off.labels(job.kind).inc()
            facts = {"job": job.id, "code": error.code, "reason": error.detail, "seconds": delay}
            logger.warning("a job is put off", extra=facts)
            await self._count()

    @contextlib.asynccontextmanager
    async def _video(self, job: StoredJob) -> AsyncIterator[Path]:
        """The job's video, read from its URL if it has one."""
        if job.source is None:
            yield self._videos / job.id
            return
        with self.incoming.file() as file:
            limit = self._settings.long_upload_timeout_s
            try:
                async with asyncio.timeout(limit):
                    most = self._settings.max_long_upload_bytes
                    await self._sources.fetch(job.source, file, most)
            except TimeoutError:
                raise UploadTimeoutError(f"The video could not be read in {limit:g} s.") from None
            file.close()
            yield file.path

    async def _ended(self, job: StoredJob) -> None:
        video = self._videos / job.id
        if video.exists():
            video.unlink()
            self.incoming.used_bytes -= job.size
        await self._count()
        self._wake_hooks.set()

    async def _call_webhooks(self) -> None:
        """Calls who is to be called, when it is time; sleeps until then."""
        while True:
            self._wake_hooks.clear()
            due = await self._patiently(lambda store: store.hooks_due(time.time(), AT_ONCE))
            if due:
                await asyncio.gather(*map(self._call, due))
                continue
            await _until(self._wake_hooks, await self._patiently(JobStore.next_hook))

    async def _call(self, job: StoredJob) -> None:
        body = self._hook_body(job)
        if await self._webhooks.call(job.webhook or "", job.id, body, time.time()):
            result, wait = "done", None
        else:
            wait = wait_after(job.hook_attempts + 1)
            result = "given_up" if wait is None else "failed"
        self._metrics.webhooks.labels(result).inc()
        state = {"done": "delivered", "given_up": "failed", "failed": "waiting"}[result]
        due = None if wait is None else time.time() + wait
        await self._patiently(lambda store: store.note_hook(job.id, state, due))  # type: ignore[arg-type] # one of the three

    async def _tidy(self) -> None:
        """Forgets jobs whose time is over."""
        keep = self._settings.job_retention_s
        while True:
            ended = await self._patiently(
                lambda store: store.remove_ended_before(time.time() - keep)
            )
            if ended:
                await self._results.remove(ended)
                await self._count()
            await asyncio.sleep(min(_TIDY_EVERY_S, keep))

    async def _count(self) -> None:
        counts = await self._patiently(JobStore.counts)
        for state in STATES:
            self._metrics.jobs.labels(state).set(counts[state])

    async def _asked(self, use: Callable[[JobStore], T]) -> T:
        """For a client, who may come again.

        Raises:
            SpoolFullError: the disk is full.
        """
        try:
            return await self._db(use)
        except sqlite3.OperationalError as error:
            logger.error("the jobs' database cannot be used", extra={"reason": str(error)})
            raise SpoolFullError("Jobs cannot be read or changed at present.") from error

    async def _patiently(self, use: Callable[[JobStore], T]) -> T:
        """For what must not be lost: again and again while the disk is full."""
        while True:
            try:
                return await self._db(use)
            except sqlite3.OperationalError as error:
                logger.error("the jobs' database cannot be used", extra={"reason": str(error)})
                await asyncio.sleep(_RETRY_STORE_S)

    async def _db(self, use: Callable[[JobStore], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(use, self._store))


async def _until(event: asyncio.Event, moment: float | None) -> None:
    """Sleeps until the event is set, or until a moment, if there is one."""
    limit = None if moment is None else moment - time.time()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit):
            await event.wait()


def _full() -> JobsFullError:
    return JobsFullError("Too many jobs wait already.")


def _error_of(error: ServiceError) -> dict[str, Any]:
    return {"code": error.code, "status": error.status, "detail": error.detail}


def _as_error(stored: Mapping[str, Any]) -> ServiceError:
    error = ServiceError(stored["detail"])
    error.code, error.status = stored["code"], stored["status"]
    return error
