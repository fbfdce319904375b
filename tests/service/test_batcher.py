"""The batcher's promises: every request answered once and right, fair, bounded, undisturbed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.runtime.interface import Outputs
from service.batcher import Batcher
from service.errors import InternalError, QueueFullError

Frames = NDArray[np.uint8]


def clips(*values: int) -> Frames:
    """Tiny clips that each hold one number."""
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1, 1)


def values_of(logits: NDArray[np.float32]) -> list[int]:
    return [int(row[0]) for row in logits]


class Engine:
    """Answers each clip with its own number; can be held, slowed and made to fail."""

    slots = 1
    batches: tuple[int, ...] = ()

    def __init__(self, seconds: float = 0.0, poison: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.seconds = seconds
        self.poison = poison
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()

    def run(self, frames: Frames) -> Outputs:
        batch = [int(clip.flat[0]) for clip in frames]
        self.batches.append(batch)
        self.running.set()
        assert self.gate.wait(10)
        time.sleep(self.seconds)
        if self.poison in batch:
            raise ValueError("poisoned")
        answers = np.array(batch, np.float32)[:, None]
        return Outputs(answers, answers * 2)


def run_with(
    engine: Engine,
    body: Callable[[Batcher], object],
    **options: object,
) -> None:
    async def run() -> None:
        batcher = Batcher([engine], **{"max_batch": 4, "max_queue": 1000, **options})
        batcher.start()
        try:
            await body(batcher)
        finally:
            await batcher.close()

    asyncio.run(asyncio.wait_for(run(), 30))


async def hold(batcher: Batcher, engine: Engine) -> asyncio.Task:
    """Occupies the engine with clip 255 so that what follows has to queue."""
    engine.gate.clear()
    engine.running.clear()
    first = asyncio.create_task(batcher.submit(clips(255)))
    await asyncio.to_thread(engine.running.wait, 10)
    return first


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    max_batch=st.integers(1, 6),
    settle_ms=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_every_request_gets_its_own_answers_once_whatever_the_batches(
    sizes: list[int], max_batch: int, settle_ms: float
) -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        starts = np.cumsum([0, *sizes])
        wanted = [
            list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)
        ]
        answers = await asyncio.gather(*(batcher.submit(clips(*own)) for own in wanted))
        assert [values_of(answer.logits) for answer in answers] == wanted
        assert all(
            (answer.embedding == answer.logits * 2).all() and answer.queue_s >= 0
            for answer in answers
        )
        ran = sorted(number for batch in engine.batches for number in batch)
        assert ran == list(range(sum(sizes)))
        assert max(map(len, engine.batches)) <= max_batch

    run_with(engine, body, max_batch=max_batch, settle_s=settle_ms / 1e3)


def test_what_waits_while_the_engine_runs_goes_together() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        first = await hold(batcher, engine)
        rest = [asyncio.create_task(batcher.submit(clips(number))) for number in range(4)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, *rest)
        assert engine.batches == [[255], [0, 1, 2, 3]]

    run_with(engine, body)


def test_after_a_batch_of_several_it_waits_a_moment_for_as_many() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        first = await hold(batcher, engine)
        pair = [asyncio.create_task(batcher.submit(clips(number))) for number in (1, 2)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, *pair)
        early = asyncio.create_task(batcher.submit(clips(3)))
        await asyncio.sleep(0.01)
        late = asyncio.create_task(batcher.submit(clips(4)))
        await asyncio.gather(early, late)
        assert engine.batches == [[255], [1, 2], [3, 4]]

    run_with(engine, body, settle_s=5.0)


def test_it_does_not_wait_for_company_that_never_comes() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        first = await hold(batcher, engine)
        pair = [asyncio.create_task(batcher.submit(clips(number))) for number in (1, 2)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, *pair)
        await batcher.submit(clips(3))
        assert engine.batches[-1] == [3]

    run_with(engine, body, settle_s=0.002)


def test_a_small_request_overtakes_the_rest_of_a_large_one() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        first = await hold(batcher, engine)
        large = asyncio.create_task(batcher.submit(clips(*range(100))))
        await asyncio.sleep(0)
        small = asyncio.create_task(batcher.submit(clips(200)))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, small, large)
        assert 200 in engine.batches[1], "it should have been in the very next batch"

    run_with(engine, body)


def test_requests_of_equal_size_are_served_in_turn() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        first = await hold(batcher, engine)
        tasks = [
            asyncio.create_task(batcher.submit(clips(*range(start, start + 4))))
            for start in (0, 10, 20)
        ]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, *tasks)
        assert engine.batches[1] == [0, 10, 20, 1]

    run_with(engine, body)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        first = await hold(batcher, engine)
        waiting = asyncio.create_task(batcher.submit(clips(1, 2, 3)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as refusal:
            await batcher.submit(clips(4, 5))
        assert int(refusal.value.headers["Retry-After"]) >= 1
        still_fits = asyncio.create_task(batcher.submit(clips(6)))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, waiting, still_fits)

    run_with(engine, body, max_queue=4)


def test_the_wait_that_is_told_follows_the_rate_of_the_engine() -> None:
    engine = Engine(seconds=0.25)

    async def body(batcher: Batcher) -> None:
        await batcher.submit(clips(0))
        running = await hold(batcher, engine)
        queued = asyncio.create_task(batcher.submit(clips(*range(40))))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as refusal:
            await batcher.submit(clips(1))
        # 40 clips wait at 0.25 s each; half of them are done after 5 s.
        assert 5 <= int(refusal.value.headers["Retry-After"]) <= 10
        queued.cancel()
        engine.gate.set()
        await running

    run_with(engine, body, max_queue=40)


def test_abandoned_work_never_reaches_the_engine_and_frees_its_place() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        first = await hold(batcher, engine)
        gone = asyncio.create_task(batcher.submit(clips(1, 2, 3)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        stays = asyncio.create_task(batcher.submit(clips(4, 5, 6)))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, stays)
        assert engine.batches == [[255], [4, 5, 6]]
        assert batcher.waiting == 0

    run_with(engine, body, max_queue=3)


def test_a_caller_that_leaves_while_its_batch_runs_does_no_harm() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        leaving = await hold(batcher, engine)
        leaving.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        answer = await batcher.submit(clips(7))
        assert values_of(answer.logits) == [7]

    run_with(engine, body)


def test_one_poisoned_request_does_not_fail_its_neighbours() -> None:
    engine = Engine(poison=13)

    async def body(batcher: Batcher) -> None:
        first = await hold(batcher, engine)
        tasks = [asyncio.create_task(batcher.submit(clips(n))) for n in (1, 13, 2)]
        await asyncio.sleep(0)
        engine.gate.set()
        await first
        good, bad, also_good = await asyncio.gather(*tasks, return_exceptions=True)
        assert values_of(good.logits) == [1]
        assert values_of(also_good.logits) == [2]
        assert isinstance(bad, InternalError)
        assert values_of((await batcher.submit(clips(3))).logits) == [3]

    run_with(engine, body)


def test_logits_that_are_not_numbers_are_an_error_not_an_answer() -> None:
    class Broken(Engine):
        def run(self, frames: Frames) -> Outputs:
            nothing = np.full((len(frames), 1), np.nan, np.float32)
            return Outputs(nothing, nothing)

    async def body(batcher: Batcher) -> None:
        with pytest.raises(InternalError):
            await batcher.submit(clips(1))

    run_with(Broken(), body)


def test_the_age_of_the_queue_grows_while_the_engine_hangs_and_leavers_do_not_count() -> None:
    engine = Engine()

    async def body(batcher: Batcher) -> None:
        assert batcher.queue_age_s() == 0
        running = await hold(batcher, engine)
        assert batcher.queue_age_s() == 0, "a batch that runs does not wait"
        waiting = asyncio.create_task(batcher.submit(clips(1)))
        await asyncio.sleep(0.1)
        assert batcher.queue_age_s() >= 0.1
        waiting.cancel()
        await asyncio.sleep(0)
        assert batcher.queue_age_s() == 0
        engine.gate.set()
        await running

    run_with(engine, body)


def test_closing_ends_those_who_wait() -> None:
    engine = Engine()

    async def run() -> None:
        batcher = Batcher([engine], max_batch=4, max_queue=10)
        batcher.start()
        running = await hold(batcher, engine)
        waiting = asyncio.create_task(batcher.submit(clips(1)))
        await asyncio.sleep(0)
        engine.gate.set()
        await batcher.close()
        results = await asyncio.gather(running, waiting, return_exceptions=True)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_an_idle_batcher_uses_no_cpu() -> None:
    async def body(batcher: Batcher) -> None:
        await batcher.submit(clips(1))
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.05

    run_with(Engine(), body)
