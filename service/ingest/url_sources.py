"""Videos that clients name by URL instead of sending them: read into the spool within its limits.

Off unless `TIMESFORMER_SOURCE_HOSTS` lists hosts. Object stores are read by presigned URLs.
"""

from __future__ import annotations

import asyncio
import time

from service.errors import (
    SourceFailedError,
    SourceRefusedError,
    UploadTooLargeError,
)
from service.ingest.http_client import HttpClient, Reply
from service.ingest.spool import SpoolFile
from service.ingest.url_policy import (
    DestinationRefusedError,
    ExchangeFailedError,
    Policy,
    check_url,
)
from service.observability.metrics import Metrics
from service.settings import MIB, Settings

_SILENCE_S = 15.0
_BLOCK = MIB
_RESOLVERS = 16


class Sources:
    """Reads videos from the hosts that the settings list."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        policy = Policy(settings.hosts_of_sources, settings.source_http, settings.source_private)
        self._client = HttpClient(policy, _SILENCE_S, _RESOLVERS)
        self._metrics = metrics

    def check(self, url: str) -> None:
        """Looks at the text of a URL.

        Raises:
            SourceRefusedError: it will not be read.
        """
        if not self._client.policy.hosts:
            raise SourceRefusedError(
                "This service reads no URLs: TIMESFORMER_SOURCE_HOSTS lists no host."
            )
        try:
            check_url(url, self._client.policy)
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
        result = "failed"
        try:
            async with self._client.request("GET", url) as reply:
                await _read(reply, file, max_bytes)
            result = "done"
        except DestinationRefusedError as error:
            result = "refused"
            raise SourceRefusedError(str(error)) from None
        except ExchangeFailedError as error:
            raise SourceFailedError(str(error)) from None
        finally:
            self._metrics.source_seconds.labels(result).observe(time.perf_counter() - started)

    def close(self) -> None:
        self._client.close()


async def _read(reply: Reply, file: SpoolFile, max_bytes: int) -> None:
    if reply.status != 200:
        redirect = "; redirects are not followed" if 300 <= reply.status < 400 else ""
        raise SourceFailedError(
            f"The host {reply.host} answers with status {reply.status}{redirect}."
        )
    if reply.header("content-encoding", "identity") != "identity":
        raise SourceFailedError(f"The host {reply.host} sends a content encoding.")
    chunked = reply.header("transfer-encoding")
    announced = 0 if chunked else int(reply.header("content-length", "0"))
    if announced > max_bytes:
        raise _too_large(max_bytes)
    file.spool.expect(announced)
    async for block in reply.blocks():
        if file.size + len(block) > max_bytes:
            raise _too_large(max_bytes)
        file.add(block)
        if file.pending > _BLOCK:
            await asyncio.to_thread(file.write)
    await asyncio.to_thread(file.write)


def _too_large(max_bytes: int) -> UploadTooLargeError:
    return UploadTooLargeError(
        f"The video is larger than {max_bytes / MIB:,.2f} MiB, the limit of this service."
    )
