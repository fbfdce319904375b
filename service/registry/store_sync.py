"""Keeps a folder of this node like the store of bundles at a URL, for the watches on that folder.

What serves goes on serving while the store cannot be reached: the log and a metric tell. A start
without it serves what the folder holds, with a warning, or fails if that is nothing.
"""

from __future__ import annotations

import asyncio
import logging

from export.bundle.bundle import BundleError
from service.observability.metrics import Metrics
from service.registry.loading import follow_store, store_of, was_activated
from service.settings import Settings

logger = logging.getLogger(__name__)

# A store that hangs is not waited for any longer, where there is something to serve.
_START_TIMEOUT_S = 20.0


class Mirror:
    """The folder at `store`, which follows `store_url` from `start` to `close`; or nothing at all,
    if there is no such URL."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._following: asyncio.Task[None] | None = None
        self._problem: str | None = None

    async def start(self) -> None:
        """Fetches what is active.

        Raises:
            BundleError: it cannot be fetched, and nothing was before.
        """
        if self._settings.store_url is None:
            return
        self._metrics.store_behind.set(0)
        cached = await asyncio.to_thread(self._is_filled)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S if cached else None):
                await asyncio.to_thread(follow_store, self._settings)
        except (BundleError, TimeoutError) as error:
            if not cached:
                raise
            self._tell(str(error) or f"no answer in {_START_TIMEOUT_S:g} s")
        if self._settings.watch_interval_s:
            self._following = asyncio.create_task(self._follow(), name="mirror of the store")

    async def close(self) -> None:
        """Stops following."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    def _is_filled(self) -> bool:
        store = store_of(self._settings)
        names = self._settings.model_names or store.names()
        return any(was_activated(store, name) for name in names)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_interval_s)
            try:
                await asyncio.to_thread(follow_store, self._settings)
            except BundleError as error:
                self._tell(str(error))
            except Exception as error:  # a watch that ends would do so in silence
                self._tell(repr(error))
            else:
                self._tell(None)

    def _tell(self, problem: str | None) -> None:
        """Says it once when it begins, when it changes and when it ends."""
        self._metrics.store_behind.set(problem is not None)
        if problem == self._problem:
            return
        self._problem = problem
        if problem is None:
            logger.info("the store is followed again")
        else:
            logger.error("the store cannot be followed", extra={"reason": problem})
