"""A shadow works only while the serving engine rests, and what it has no time for is dropped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle.bundle import Bundle, BundleStore, Candidate
from export.runtime.interface import Outputs
from service.observability.metrics import Metrics
from service.registry.candidate import Trial
from service.registry.instance import ServedModel
from service.registry.loading import LoadedModel
from service.settings import load_settings
from tests.export.conftest import publish_colours


class Engine:
    """Answers each batch once it may, and remembers the sizes."""

    engine, provider, device, precision = "fake", "fake", "cpu", "float32"
    gpu, slots, batches = None, 1, ()

    def __init__(self) -> None:
        self.ran: list[int] = []

    def run(self, frames: np.ndarray) -> Outputs:
        self.ran.append(len(frames))
        return Outputs(np.zeros((len(frames), 3), np.float32), np.zeros((len(frames), 16)))

    def close(self) -> None:
        pass


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return publish_colours(BundleStore(tmp_path))


Scenario = Callable[[ServedModel, Trial, Engine], Awaitable[None]]


def play(bundle: Bundle, scenario: Scenario, run: Any = None) -> Metrics:
    """Runs a scenario with a serving version, and a shadow of all its requests."""
    metrics = Metrics()

    async def stage() -> None:
        settings = load_settings(device="cpu", max_batch_clips=2)
        engines = Engine(), Engine()
        if run is not None:
            engines[0].run = run
        serving, tried = (
            ServedModel(LoadedModel(bundle, (engine,)), settings, metrics) for engine in engines
        )
        candidate = Candidate(version="2", mode="shadow", share=1)
        trial = Trial(candidate, tried, metrics, lambda: serving, lambda trial, reason: None)
        trial.start()
        try:
            await asyncio.wait_for(scenario(serving, trial, engines[1]), 60)
        finally:
            trial.stop()
            await asyncio.gather(serving.close(), tried.close())

    asyncio.run(stage())
    return metrics


def clips(count: int) -> np.ndarray:
    return np.zeros((count, 4, 16, 16, 3), np.uint8)


def offer(trial: Trial, count: int) -> None:
    trial.offer(clips(count), np.zeros((count, 3), np.float32), trial.model.bundle)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - no event tells of a count
        await asyncio.sleep(0.01)


def test_it_waits_until_the_serving_engine_has_nothing_to_do(bundle: Bundle) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(frames: np.ndarray) -> Outputs:
        entered.set()
        assert go_on.wait(60)
        return Engine().run(frames)

    async def scenario(serving: ServedModel, trial: Trial, shadow: Engine) -> None:
        asked = asyncio.ensure_future(serving.batcher.submit(clips(3)))
        await until(entered.is_set)
        offer(trial, 1)
        await asyncio.sleep(0.2)
        assert shadow.ran == []
        go_on.set()
        await asked
        await until(lambda: trial.counts["agreed"] == 1)
        assert shadow.ran == [1]

    play(bundle, scenario, slow)


def test_many_clips_go_batch_by_batch_with_a_look_at_the_serving_engine_before_each(
    bundle: Bundle,
) -> None:
    async def scenario(serving: ServedModel, trial: Trial, shadow: Engine) -> None:
        offer(trial, 5)
        await until(lambda: trial.counts["agreed"] == 1)
        assert shadow.ran == [2, 2, 1]

    play(bundle, scenario)


def test_only_its_share_of_the_requests_is_copied(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(serving: ServedModel, trial: Trial, shadow: Engine) -> None:
        for drawn in (1.0, 0.0, 1.0):
            monkeypatch.setattr("random.random", lambda drawn=drawn: drawn)
            offer(trial, 2)
        await until(lambda: trial.counts["agreed"] == 1)
        assert shadow.ran == [2]

    play(bundle, scenario)


def test_what_it_has_no_room_for_is_dropped_at_once_and_counted(bundle: Bundle) -> None:
    async def scenario(serving: ServedModel, trial: Trial, shadow: Engine) -> None:
        for _ in range(10):
            offer(trial, 30)  # none can begin before the event loop turns
        assert trial.counts["dropped"] == 8
        await until(lambda: trial.counts["agreed"] == 2)
        offer(trial, 30)
        await until(lambda: trial.counts["agreed"] == 3)

    metrics = play(bundle, scenario)
    value = metrics.registry.get_sample_value
    labels = {"model": "colours", "result": "dropped"}
    assert value("timesformer_candidate_requests_total", labels) == 8


def test_clips_of_another_kind_are_not_for_it(bundle: Bundle, tmp_path: Path) -> None:
    preprocessing = {**bundle.manifest.preprocessing, "frame_stride": 1}
    other = publish_colours(BundleStore(tmp_path), preprocessing=preprocessing)

    async def scenario(serving: ServedModel, trial: Trial, shadow: Engine) -> None:
        trial.offer(clips(1), np.zeros((1, 3), np.float32), other)
        assert trial.counts["dropped"] == 1

    play(bundle, scenario)


def test_what_a_shadow_does_is_not_in_the_metrics_of_what_serves(bundle: Bundle) -> None:
    async def scenario(serving: ServedModel, trial: Trial, shadow: Engine) -> None:
        offer(trial, 2)
        await until(lambda: trial.counts["agreed"] == 1)

    metrics = play(bundle, scenario)
    value = metrics.registry.get_sample_value
    assert value("timesformer_batch_clips_count", {"model": "colours"}) == 0
    assert value("timesformer_candidate_seconds_count", {"model": "colours"}) == 1
