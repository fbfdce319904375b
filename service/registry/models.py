"""The models that serve, by name. One that cannot be loaded or swapped does not hurt the others."""

from __future__ import annotations

import asyncio
import logging

from export.bundle.bundle import BundleError
from service.errors import ModelNotFoundError
from service.observability.metrics import Metrics
from service.registry.host import ModelHost
from service.registry.instance import UNUSABLE
from service.registry.loading import largest_batch, served_names, store_of, was_activated
from service.registry.tensorrt_plans import OFF, Engines, find_tensorrt
from service.settings import ALL_MODELS, Settings

logger = logging.getLogger(__name__)


class Models:
    """A host for each name that the settings ask for; the first is the default."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._hosts: dict[str, ModelHost] = {}
        self._engines: Engines | None = None
        self._tensorrt = OFF
        self._watcher: asyncio.Task[None] | None = None

    @property
    def hosts(self) -> tuple[ModelHost, ...]:
        """All of them, the default first."""
        return tuple(self._hosts.values())

    @property
    def is_ready(self) -> bool:
        """Whether one of them answers requests, which is enough."""
        return any(host.is_ready for host in self.hosts)

    def find(self, name: str | None = None) -> ModelHost:
        """The host of a name, by default the first.

        Raises:
            ModelNotFoundError: there is no such model; it names those that there are.
        """
        if name is None:
            return next(iter(self._hosts.values()))
        host = self._hosts.get(name)
        if host is None:
            known = ", ".join(f"'{known}'" for known in self._hosts)
            raise ModelNotFoundError(f"There is no such model here; there is {known}.")
        return host

    async def start(self) -> None:
        """Loads the active version of each name, one after the other.

        Raises:
            BundleError, RuntimeUnavailableError: not one of them can be served.
        """
        names = await asyncio.to_thread(served_names, self._settings)
        found, self._tensorrt = await asyncio.to_thread(find_tensorrt, self._settings)
        if found:
            largest = largest_batch(self._settings, "cuda")
            settings = self._settings
            self._engines = Engines(
                found,
                largest,
                settings.precision,
                settings.refittable_plans,
                builds=settings.tensorrt == "auto",
            )
        for name in names:
            await self._add(name, alone=len(names) == 1)
        if not any(host.is_serving for host in self.hosts):
            reasons = "; ".join(f"{host.name}: {host.refusal}" for host in self.hosts)
            raise BundleError(f"none of the models can be served: {reasons}")
        if self._settings.watch_interval_s:
            for host in self.hosts:
                host.watch()
            if self._settings.model == ALL_MODELS:
                self._watcher = asyncio.create_task(self._watch(), name="watch for new names")

    async def close(self) -> bool:
        """Stops the watches and frees the models; False if an engine hangs, which then stays."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._engines is not None:
            self._engines.stop()
        return all(await asyncio.gather(*(host.close() for host in self.hosts)))

    async def _add(self, name: str, *, alone: bool) -> ModelHost:
        host = ModelHost(name, self._settings, self._metrics, self._engines, self._tensorrt)
        self._hosts[name] = host
        try:
            await host.start()
        except UNUSABLE as error:
            if alone:
                raise
            host.refuse(str(error))
        return host

    async def _watch(self) -> None:
        """Takes names that come into the store, once a version of them is active."""
        store = store_of(self._settings)
        while True:
            await asyncio.sleep(self._settings.watch_interval_s)
            try:
                names = await asyncio.to_thread(store.names)
                for name in names:
                    if name not in self._hosts and was_activated(store, name):
                        (await self._add(name, alone=False)).watch()
            except Exception as error:  # a disk that fails for a moment must not end the watch
                logger.error("the store cannot be listed", extra={"reason": str(error)})
