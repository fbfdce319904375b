"""Which candidate version of a model is tried, as the store and the administrators have it.

The store says so in a file beside the active version's, so that all replicas try the same. One that
cannot be loaded is refused, and one whose engine fails is taken out; both are told until the store
names another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle, BundleError, BundleStore, Candidate
from service.errors import (
    BundleRefusedError,
    DeadlineUnreachableError,
    InternalError,
    QueueFullError,
    ServiceError,
)
from service.inference.scheduler import Answer
from service.observability.metrics import Metrics
from service.registry.candidate import Trial
from service.registry.instance import UNUSABLE, ServedModel

logger = logging.getLogger(__name__)
# What another version may do better.
_OF_THE_VERSION = (InternalError, QueueFullError, DeadlineUnreachableError)


class Candidates:
    """The trial that runs beside the serving version of one model, if one does.

    Its methods that wait must not run side by side: the host's lock is held around them.

    Args:
        current: gives the version that serves.
        load: loads a version.
        discard: frees one.
    """

    def __init__(
        self,
        name: str,
        store: BundleStore,
        metrics: Metrics,
        *,
        current: Callable[[], ServedModel],
        load: Callable[[Bundle], Awaitable[ServedModel]],
        discard: Callable[[ServedModel], None],
    ) -> None:
        self.trial: Trial | None = None
        self._name = name
        self._store = store
        self._metrics = metrics
        self._current = current
        self._load = load
        self._discard = discard
        self._refusal: tuple[Candidate | None, str] | None = None

    @property
    def refusal(self) -> str | None:
        """Why the store's candidate is not tried, while it is not."""
        return self._refusal[1] if self._refusal else None

    @property
    def serving(self) -> ServedModel:
        """The version that is no candidate."""
        return self._current()

    def pick(self, key: str | None = None, *, same_clips: bool = False) -> ServedModel:
        """The version that is to answer a request: the one that serves, or a canary.

        Args:
            key: requests with the same key get the same version.
            same_clips: the clips are there already, so that only a version which takes clips of
                the same kind may be picked.
        """
        current, trial = self._current(), self.trial
        if trial is None or not trial.is_chosen(key):
            return current
        return trial.model if not same_clips or trial.takes_clips_of(current) else current

    def gives_way(self, model: ServedModel, error: ServiceError) -> bool:
        """Whether the serving version is to answer for `model`, a candidate that could not.

        An engine that failed ends the trial, a full queue does not.
        """
        if not model.is_candidate or not isinstance(error, _OF_THE_VERSION):
            return False
        if self.trial is not None and self.trial.model is model:
            failed = isinstance(error, InternalError)
            self.trial.count("failed" if failed else "busy")
            if failed:
                self._failed(self.trial, error.detail)
        return True

    def answered(self, model: ServedModel, clips: NDArray[np.uint8], answer: Answer) -> None:
        """Notes what a version answered; a shadow may get the same clips."""
        if self.trial is None:
            return
        if model is self.trial.model:
            self.trial.answered(answer)
        else:
            self.trial.offer(clips, answer.logits, model.bundle)

    async def follow(self) -> None:
        """Begins, changes or ends the trial as the store has it."""
        try:
            candidate = await asyncio.to_thread(self._store.candidate, self._name)
        except BundleError as error:
            self._refuse(None, str(error))
            return
        if candidate is None or candidate.version == self._current().bundle.version:
            self.end()
        elif not self._is_known(candidate):
            try:
                self._begin(await self._make(candidate))
            except UNUSABLE as error:
                self.end()
                self._refuse(candidate, str(error))

    async def begin(self, candidate: Candidate) -> None:
        """Tries a version, here and by way of the store in all replicas.

        Raises:
            BundleRefusedError: it cannot be used; store and service are as they were.
        """
        try:
            trial = await self._make(candidate)
            try:
                await asyncio.to_thread(self._store.try_candidate, self._name, candidate)
            except BundleError:
                self._discard_new(trial.model)
                raise
        except UNUSABLE as error:
            raise BundleRefusedError(str(error)) from error
        self._begin(trial)

    async def withdraw(self) -> None:
        """Tries none any more, in any replica.

        Raises:
            BundleRefusedError: the store cannot be written to.
        """
        try:
            await asyncio.to_thread(self._store.try_candidate, self._name, None)
        except BundleError as error:
            raise BundleRefusedError(str(error)) from error
        self.end()

    def end(self, keep: ServedModel | None = None) -> None:
        """Ends the trial, if there is one, and frees its version unless it is to be kept."""
        self._tell(None)
        if self.trial is not None:
            trial, self.trial = self.trial, None
            trial.stop()
            if trial.model is not keep:
                self._discard(trial.model)

    def move(self, model: ServedModel) -> None:
        """The trial goes on with another engine of its version."""
        if self.trial is None:
            raise ValueError("there is no trial to go on with")
        self._begin(self.trial.moved_to(model))

    async def loaded(self, bundle: Bundle) -> ServedModel:
        """A version, loaded; the trial's own if it is that one."""
        if self.trial is not None and self.trial.candidate.version == bundle.version:
            return self.trial.model
        return await self._load(bundle)

    def _is_known(self, candidate: Candidate) -> bool:
        tried = self.trial is not None and self.trial.candidate == candidate
        return tried or (self._refusal is not None and self._refusal[0] == candidate)

    async def _make(self, candidate: Candidate) -> Trial:
        current = self._current()
        if candidate.version == current.bundle.version:
            raise BundleError(f"{self._name} version {candidate.version} serves already.")
        bundle = await asyncio.to_thread(self._store.open, self._name, candidate.version)
        model = await self.loaded(bundle)
        trial = Trial(candidate, model, self._metrics, self._current, self._failed)
        if candidate.mode == "shadow" and not trial.takes_clips_of(current):
            self._discard_new(model)
            raise BundleError(
                f"{self._name} version {candidate.version} looks at videos in another way than "
                f"version {current.bundle.version}: it can be a canary, but no shadow."
            )
        return trial

    def _begin(self, trial: Trial) -> None:
        self.end(keep=trial.model)
        self.trial = trial
        trial.start()
        candidate = trial.candidate
        facts = {"model": self._name, **candidate.model_dump(include={"version", "mode", "share"})}
        logger.info("candidate tried", extra=facts)

    def _failed(self, trial: Trial, reason: str) -> None:
        if trial is self.trial:
            self.end()
            self._refuse(trial.candidate, reason)

    def _discard_new(self, model: ServedModel) -> None:
        if self.trial is None or model is not self.trial.model:
            self._discard(model)

    def _refuse(self, candidate: Candidate | None, reason: str) -> None:
        if self._refusal != (candidate, reason):
            version = candidate.version if candidate else None
            facts = {"model": self._name, "version": version, "reason": reason}
            logger.error("candidate not tried", extra=facts)
        self._tell((candidate, reason))

    def _tell(self, refusal: tuple[Candidate | None, str] | None) -> None:
        self._refusal = refusal
        self._metrics.candidate_refused.labels(self._name).set(refusal is not None)
