"""Videos that clients name by URL instead of sending them: read into the spool within its limits.

Off unless `TIMESFORMER_SOURCE_HOSTS` lists hosts. Object stores are read by presigned URLs.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.errors import (
    SourceFailedError,
    SourceRefusedError,
    UploadTooLargeError,
)
from service.metrics import Metrics
from service.outgoing import (
    DestinationRefusedError,
    Exchange,
    ExchangeFailedError,
    Policy,
    check_url,
)
from service.settings import MIB, Settings
from service.spool import SpoolFile

T = TypeVar("T")
_SILENCE_S = 15.0
_BLOCK = MIB
# Of their own: a name server that hangs must hold up nothing but other sources.
_THREADS = 16


class Sources:
    """Reads videos from the hosts that the settings list."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._policy = Policy(
            settings.hosts_of_sources, settings.source_http, settings.source_private
        )
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="source")

    def check(self, url: str) -> None:
        """Looks at the text of a URL.

        Raises:
            SourceRefusedError: it will not be read.
        """
        if not self._policy.hosts:
            raise SourceRefusedError(
                "This service reads no URLs: TIMESFORMER_SOURCE_HOSTS lists no host."
            )
        try:
            check_url(url, self._policy)
        except DestinationRefusedError as error:
            raise SourceRefusedError(str(error)) from None

    async def fetch(self, url: str, file: SpoolFile, max_bytes: int) -> None:
        """Reads a video into the spool; being cancelled ends the connection at once.

        Raises:
            SourceRefusedError: the URL leads to where it must not.
            SourceFailedError: the other side does not answer with a file.
            UploadTooLargeError: it is larger than `max_bytes`.
            SpoolFullError: there is no room for it.
        """
        self.check(url)
        started = time.perf_counter()
        exchange = Exchange(url, self._policy, _SILENCE_S)
        result = "failed"
        try:
            response = await self._in_thread(functools.partial(exchange.begin, "GET"))
            host = exchange.destination.host
            if response.status != 200:
                redirect = "; redirects are not followed" if 300 <= response.status < 400 else ""
                raise SourceFailedError(
                    f"The host {host} answers with status {response.status}{redirect}."
                )
            if response.getheader("Content-Encoding", "identity") != "identity":
                raise SourceFailedError(f"The host {host} sends a content encoding.")
            announced = response.length or 0
            if announced > max_bytes:
                raise _too_large(max_bytes)
            file.spool.expect(announced)
            while data := await self._in_thread(functools.partial(exchange.read, _BLOCK)):
                if file.size + len(data) > max_bytes:
                    raise _too_large(max_bytes)
                file.add(data)
                if file.pending > _BLOCK:
                    await asyncio.to_thread(file.write)
            await asyncio.to_thread(file.write)
            result = "done"
        except DestinationRefusedError as error:
            result = "refused"
            raise SourceRefusedError(str(error)) from None
        except ExchangeFailedError as error:
            raise SourceFailedError(str(error)) from None
        finally:
            exchange.end()
            self._metrics.source_seconds.labels(result).observe(time.perf_counter() - started)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._threads.submit(work))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _too_large(max_bytes: int) -> UploadTooLargeError:
    return UploadTooLargeError(
        f"The video is larger than {max_bytes / MIB:,.2f} MiB, the limit of this service."
    )
