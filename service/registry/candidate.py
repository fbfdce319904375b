"""A candidate version beside the one that serves: as a shadow, or as a canary.

A shadow gets a copy of the clips of a share of the requests once these have been answered, and only
while the serving version's engine has nothing to do; what it says is compared and thrown away. A
canary answers a share of the requests itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle, Candidate
from model.scores import mean_scores
from service.errors import ServiceError
from service.inference.scheduler import Answer
from service.observability.metrics import CANDIDATE_RESULTS, Metrics
from service.registry.instance import ServedModel

# Most clips that wait for a shadow: they take memory, and the newest traffic is as good as older.
_MAX_WAITING = 64


class _Copy(NamedTuple):
    """A request that was answered."""

    clips: NDArray[np.uint8]
    logits: NDArray[np.float32]
    bundle: Bundle
    """Who answered."""


class Trial:
    """A loaded candidate, and what came of it so far.

    Args:
        current: gives the version that serves.
        on_failure: called with the trial and the reason when the candidate's engine failed as a
            shadow.
    """

    def __init__(
        self,
        candidate: Candidate,
        model: ServedModel,
        metrics: Metrics,
        current: Callable[[], ServedModel],
        on_failure: Callable[[Trial, str], None],
    ) -> None:
        self.candidate = candidate
        self.model = model
        self.counts = Counter(dict.fromkeys(CANDIDATE_RESULTS, 0))
        """Requests by what came of them, as `timesformer_candidate_requests_total`."""
        self._differences = 0.0
        self._metrics = metrics
        self._name = model.bundle.name
        self._current = current
        self._on_failure = on_failure
        self._copies: deque[_Copy] = deque()
        self._waiting = 0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def moved_to(self, model: ServedModel) -> Trial:
        """The same trial with another engine of its version; what came of it is kept."""
        moved = Trial(self.candidate, model, self._metrics, self._current, self._on_failure)
        moved.counts, moved._differences = self.counts, self._differences
        return moved

    @property
    def mean_score_difference(self) -> float | None:
        """Over the requests that were compared."""
        compared = self.counts["agreed"] + self.counts["differed"]
        return self._differences / compared if compared else None

    def start(self) -> None:
        """Begins; needs a running event loop."""
        self.model.is_candidate = True
        self._metrics.candidate_share.labels(
            self._name, self.candidate.version, self.candidate.mode
        ).set(self.candidate.share)
        if self.candidate.mode == "shadow":
            self._worker = asyncio.create_task(self._compare_copies(), name="shadow")

    def stop(self) -> None:
        """Ends the trial; the model stays open."""
        if self._worker is not None:
            self._worker.cancel()
        candidate = self.candidate
        self._metrics.candidate_share.remove(self._name, candidate.version, candidate.mode)

    def takes_clips_of(self, other: ServedModel) -> bool:
        """Whether clips for `other` are clips for the candidate too."""
        ours, theirs = self.model.bundle.config, other.bundle.config
        return ours.preprocessing == theirs.preprocessing

    def is_chosen(self, key: str | None) -> bool:
        """Whether a canary answers a request. With the same key it is always the same, also in
        other replicas; a larger share adds keys and takes none away.
        """
        if self.candidate.mode != "canary":
            return False
        if key is None:
            return random.random() < self.candidate.share
        digest = hashlib.sha256(f"{self._name}/{self.candidate.version}/{key}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64 < self.candidate.share

    def answered(self, answer: Answer) -> None:
        """Counts a request that a canary answered."""
        self.count("answered")
        self._observe(answer)

    def offer(self, clips: NDArray[np.uint8], logits: NDArray[np.float32], bundle: Bundle) -> None:
        """Gives a shadow an answered request, if it is one of its share and there is room."""
        if self.candidate.mode != "shadow" or random.random() >= self.candidate.share:
            return
        other = bundle.config.preprocessing != self.model.bundle.config.preprocessing
        if other or self._waiting + len(clips) > _MAX_WAITING:
            self.count("dropped")
            return
        self._copies.append(_Copy(clips, logits, bundle))
        self._waiting += len(clips)
        self._arrived.set()

    def count(self, result: str) -> None:
        self.counts[result] += 1
        self._metrics.candidate_requests.labels(self._name, result).inc()

    async def _compare_copies(self) -> None:
        while True:
            while not self._copies:
                self._arrived.clear()
                await self._arrived.wait()
            copy = self._copies.popleft()
            try:
                logits = await self._infer(copy.clips)
            except ServiceError as error:
                self.count("failed")
                self._on_failure(self, error.detail)
                return
            finally:
                self._waiting -= len(copy.clips)
            self._compare(copy, logits)

    async def _infer(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The candidate's logits, a batch at a time, each while the serving engine rests."""
        rows = []
        for start in range(0, len(clips), self.model.max_batch):
            await self._current().batcher.idle()
            batch = clips[start : start + self.model.max_batch]
            answer = await self.model.batcher.submit(batch)
            self._observe(answer)
            rows.append(answer.logits)
        return np.concatenate(rows)

    def _compare(self, copy: _Copy, logits: NDArray[np.float32]) -> None:
        answered = _scores(copy.bundle, copy.logits)
        ours = _scores(self.model.bundle, logits)
        self.count("agreed" if _best(answered) == _best(ours) else "differed")
        labels = answered.keys() | ours.keys()
        difference = sum(abs(answered.get(x, 0.0) - ours.get(x, 0.0)) for x in labels) / 2
        self._differences += difference
        self._metrics.candidate_score_difference.labels(self._name).observe(difference)

    def _observe(self, answer: Answer) -> None:
        seconds = answer.queue_s + answer.inference_s
        self._metrics.candidate_seconds.labels(self._name).observe(seconds)


def _scores(bundle: Bundle, logits: NDArray[np.float32]) -> dict[str, float]:
    """Scores by label, since a candidate may have others or in another order."""
    scores = mean_scores(logits, bundle.manifest.temperature)
    return dict(zip(bundle.manifest.labels, map(float, scores), strict=True))


def _best(scores: dict[str, float]) -> str:
    return max(scores, key=scores.__getitem__)
