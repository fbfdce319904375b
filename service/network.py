"""The network as endpoints use it: room for a video's clips, a version to look with, an answer.

`LocalNetwork` has the engines in this process. With several workers one process has them, and the
others ask it (`service/remote.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from service.candidates import Candidates
from service.errors import ModelNotFoundError, ServiceError
from service.models import Models
from service.served import ServedModel
from service.turns import Answer, Priority


class Wanted(NamedTuple):
    """Which model a request wants."""

    model: str | None
    """By name; None: the default."""
    version: str | None = None
    """This one and no other; None: whichever is to answer."""
    key: str | None = None
    """Requests with the same are answered by the same version."""
    canary: bool = True
    """Whether a candidate may answer."""


class Answered(NamedTuple):
    version: str
    answer: Answer


class GaveWayError(Exception):
    """A candidate could not answer; the request is to be asked again without canary."""


class Held(Protocol):
    """A version that stays open for a request."""

    @property
    def bundle(self) -> Bundle: ...

    async def answer(
        self, clips: NDArray[np.uint8], priority: Priority, deadline: float | None
    ) -> Answered:
        """Runs the clips through the network, once.

        Raises:
            ServiceError: as `Batcher.submit`.
            GaveWayError: see there; for clips that were made for a candidate.
        """


class Network(Protocol):
    """All methods raise `ModelNotFoundError` and `ModelUnavailableError`."""

    async def check_room(self, model: str | None, clips: int, priority: Priority) -> None:
        """Asks, before a video is received for nothing, whether its clips may wait.

        Raises:
            QueueFullError: too many do.
        """

    async def find(self, wanted: Wanted, priority: Priority) -> Bundle:
        """The version that is asked for, else the one that serves; before clips are received.

        Raises:
            QueueFullError: not even one more may wait.
        """

    def for_video(
        self, wanted: Wanted, clips: int, priority: Priority
    ) -> AbstractAsyncContextManager[Held]:
        """The version that is to look at a video, with room for so many clips of it.

        Raises:
            QueueFullError: there is none.
        """

    def for_clips(self, wanted: Wanted) -> AbstractAsyncContextManager[Held]:
        """The version that clips which are there already are read for. The answer may be that of
        a candidate which takes clips of the same kind.
        """


class LocalNetwork:
    """A `Network` with its engines in this process."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def check_room(self, model: str | None, clips: int, priority: Priority) -> None:
        self._models.find(model).current.batcher.check_room(clips, priority)

    async def find(self, wanted: Wanted, priority: Priority) -> Bundle:
        model = self.model(wanted)
        model.batcher.check_queue(1, priority)  # as for clips that are there
        return model.bundle

    def model(self, wanted: Wanted) -> ServedModel:
        """The version that is asked for, else the one that serves, with its engines.

        Raises:
            ModelNotFoundError, ModelUnavailableError: there is none.
        """
        candidates = self._models.find(wanted.model).candidates
        serving = candidates.serving
        if wanted.version is None:
            return serving
        known = {serving.bundle.version: serving}
        if candidates.trial is not None:
            known[candidates.trial.candidate.version] = candidates.trial.model
        if wanted.version not in known:
            raise ModelNotFoundError(
                f"no such version serves here; '{serving.bundle.name}' has {', '.join(known)}"
            )
        return known[wanted.version]

    @contextlib.asynccontextmanager
    async def for_video(
        self, wanted: Wanted, clips: int, priority: Priority
    ) -> AsyncIterator[Held]:
        candidates = self._models.find(wanted.model).candidates
        model = candidates.pick(wanted.key) if wanted.canary else candidates.serving
        room = candidates.serving.batcher.reserved(clips, priority)
        # One version from sampling to labels, also when another takes over meanwhile.
        with room as release, model.in_use():
            yield _HeldForVideo(candidates, model, release)

    def for_clips(self, wanted: Wanted) -> AbstractAsyncContextManager[Held]:
        return _HeldForClips(self._models.find(wanted.model).candidates, self.model(wanted), wanted)


class _HeldForVideo:
    def __init__(
        self, candidates: Candidates, model: ServedModel, release: Callable[[], None]
    ) -> None:
        self.bundle = model.bundle
        self._candidates = candidates
        self._model = model
        self._release = release

    async def answer(
        self, clips: NDArray[np.uint8], priority: Priority, deadline: float | None
    ) -> Answered:
        self._release()
        try:
            answer = await self._model.batcher.submit(clips, priority, deadline)
        except ServiceError as error:
            if self._candidates.gives_way(self._model, error):
                raise GaveWayError from error
            raise
        self._candidates.answered(self._model, clips, answer)
        return Answered(self.bundle.version, answer)


class _HeldForClips(AbstractAsyncContextManager[Held]):
    """On the way of the hottest requests, so it is its own context manager."""

    def __init__(self, candidates: Candidates, model: ServedModel, wanted: Wanted) -> None:
        self.bundle = model.bundle
        self._candidates = candidates
        self._model = model
        self._wanted = wanted
        self._use = model.in_use()

    async def __aenter__(self) -> Held:
        self._use.__enter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._use.__exit__(kind, error, trace)

    async def answer(
        self, clips: NDArray[np.uint8], priority: Priority, deadline: float | None
    ) -> Answered:
        candidates, model = self._candidates, self._model
        if self._wanted.version is not None:
            answer = await model.batcher.submit(clips, priority, deadline)
            return Answered(self.bundle.version, answer)
        if model is candidates.serving:  # else another took over, and the clips are for this one
            model = candidates.pick(self._wanted.key, same_clips=True)
        try:
            with model.in_use():
                answer = await model.batcher.submit(clips, priority, deadline)
        except ServiceError as error:
            if not candidates.gives_way(model, error):
                raise
            model = candidates.serving
            with model.in_use():
                answer = await model.batcher.submit(clips, priority, deadline)
        candidates.answered(model, clips, answer)
        return Answered(model.bundle.version, answer)
