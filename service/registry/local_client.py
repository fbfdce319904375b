"""Inference for endpoints: capacity for a video's clips, the version that answers, and its answer.

Knows nothing of HTTP and nothing of files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from service.errors import ModelNotFoundError, ServiceError
from service.inference.scheduler import Answer, Priority
from service.registry.instance import ServedModel
from service.registry.models import Models
from service.registry.rollout import Candidates


class Wanted(NamedTuple):
    """The model that a request asks for."""

    model: str | None
    """Its name; None: the default model."""
    version: str | None = None
    """The only version that may answer; None: the active version or a candidate."""
    key: str | None = None
    """Requests with the same key are answered by the same version."""
    canary: bool = True
    """Whether a candidate may answer."""


class GaveWayError(Exception):
    """A candidate could not answer; the caller repeats the request without canary."""


class Network:
    """All methods raise `ModelNotFoundError` and `ModelUnavailableError`."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def check_room(self, model: str | None, clips: int, priority: Priority) -> None:
        """Checks the queue before a video is received, so that no upload is received in vain.

        Raises:
            QueueFullError: the queue has no capacity for so many clips.
        """
        self._models.find(model).current.batcher.check_room(clips, priority)

    def find(self, wanted: Wanted, priority: Priority) -> Bundle:
        """Returns the bundle of the requested version; before clips are received.

        Raises:
            QueueFullError: the queue has no capacity for even one clip.
        """
        model = self.model(wanted)
        model.batcher.check_queue(1, priority)  # as for clips that are there
        return model.bundle

    def model(self, wanted: Wanted) -> ServedModel:
        """Returns the requested version, by default the active version, with its engines."""
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

    @contextlib.contextmanager
    def for_video(self, wanted: Wanted, clips: int, priority: Priority) -> Iterator[VideoLease]:
        """Reserves capacity for so many clips of a video, and the version that answers.

        Raises:
            QueueFullError: the queue has no capacity for so many clips.
        """
        candidates = self._models.find(wanted.model).candidates
        model = candidates.pick(wanted.key) if wanted.canary else candidates.serving
        room = candidates.serving.batcher.reserved(clips, priority)
        # The same version from sampling to labels, also if another version is activated meanwhile.
        with room as release, model.in_use():
            yield VideoLease(candidates, model, release)

    def for_clips(self, wanted: Wanted) -> ClipsLease:
        """Keeps the version open whose clips the client sent. A candidate may answer instead if
        its clips have the same shape and preprocessing.
        """
        return ClipsLease(self._models.find(wanted.model).candidates, self.model(wanted), wanted)


class VideoLease:
    """The version that a video is decoded for, with capacity for its clips."""

    def __init__(
        self, candidates: Candidates, model: ServedModel, release: Callable[[], None]
    ) -> None:
        self.bundle = model.bundle
        self._candidates = candidates
        self._model = model
        self._release = release

    async def answer(
        self, clips: NDArray[np.uint8], priority: Priority, deadline: float | None
    ) -> Answer:
        """Runs the clips through the network, once.

        Raises:
            ServiceError: as `Batcher.submit`.
            GaveWayError: the version is a candidate, and could not answer.
        """
        self._release()
        try:
            answer = await self._model.batcher.submit(clips, priority, deadline)
        except ServiceError as error:
            if self._candidates.gives_way(self._model, error):
                raise GaveWayError from error
            raise
        self._candidates.answered(self._model, clips, answer)
        return answer


class ClipsLease:
    """The version that clips of a client are checked against. A class and no generator, because
    the hottest requests use it.
    """

    def __init__(self, candidates: Candidates, model: ServedModel, wanted: Wanted) -> None:
        self.bundle = model.bundle
        self._candidates = candidates
        self._model = model
        self._wanted = wanted
        self._use = model.in_use()

    def __enter__(self) -> ClipsLease:
        self._use.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._use.__exit__(kind, error, trace)

    async def answer(
        self, clips: NDArray[np.uint8], priority: Priority, deadline: float | None
    ) -> tuple[str, Answer]:
        """Runs the clips through the network; returns the version that answered, and its answer.

        Raises:
            ServiceError: as `Batcher.submit`.
        """
        candidates, model = self._candidates, self._model
        if self._wanted.version is not None:
            return self.bundle.version, await model.batcher.submit(clips, priority, deadline)
        if model is candidates.serving:  # else another version is active, and these clips fit this
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
        return model.bundle.version, answer
