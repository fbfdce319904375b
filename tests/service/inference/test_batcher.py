"""The batcher: one rule a test, in virtual time with engines that are stepped (`stepped.py`).

Invariants for any order of events are in `test_batcher_properties.py`.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export.runtime.interface import Outputs
from service.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    InternalError,
    QueueFullError,
)
from service.inference.batcher import Batcher
from service.inference.engine_worker import TRY_EVERY_S, Events
from service.inference.scheduler import Answer, Priority, Request, Turns
from service.registry.local_client import Network, Wanted
from tests.service.inference.stepped import Frames, Stepped, SteppedEngine, clips, virtual


def submit(stepped: Stepped, *values: int, **options: Any) -> asyncio.Task[Answer]:
    return asyncio.ensure_future(stepped.batcher.submit(clips(*values), **options))


def logits(task: asyncio.Task[Answer]) -> list[int]:
    return [int(row[0]) for row in task.result().logits]


async def occupy(stepped: Stepped, engine: int = 0) -> None:
    """Lets an engine begin a batch, so that what follows has to queue."""
    submit(stepped, 9999)
    assert await stepped.begin(engine)


class Dropped(Events):
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.removed: list[int] = []

    def request_dropped(self, reason: str) -> None:
        self.reasons.append(reason)

    def engine_removed(self, engine: int) -> None:
        self.removed.append(engine)


async def measure(stepped: Stepped, seconds: float) -> None:
    """Lets one batch of one clip take so long, so that there is a drain rate."""
    submit(stepped, 0)
    await stepped.begin()
    stepped.loop.now += seconds
    await stepped.end()


@virtual
async def test_requests_of_equal_size_share_batches_and_take_turns() -> None:
    engine = SteppedEngine()
    stepped = Stepped(engine)
    await occupy(stepped)
    tasks = [submit(stepped, *range(start, start + 4)) for start in (0, 10, 20)]
    await stepped.finish()
    assert engine.ran[1] == [0, 10, 20, 1]
    assert [logits(task)[0] for task in tasks] == [0, 10, 20]


@virtual
async def test_after_a_batch_of_several_clips_it_waits_for_as_many_but_not_for_ever() -> None:
    engine = SteppedEngine()
    stepped = Stepped(engine, settle_s=5.0)
    await occupy(stepped)
    submit(stepped, 1), submit(stepped, 2)
    await stepped.end()
    assert await stepped.step()
    submit(stepped, 3)
    await stepped.turn()
    await stepped.wait(4.9)
    assert not stepped.threads[0].jobs
    submit(stepped, 4)
    assert await stepped.step()
    submit(stepped, 5)
    await stepped.turn()
    await stepped.wait(4.9)
    assert not stepped.threads[0].jobs
    await stepped.wait(0.2)
    assert await stepped.step()
    assert engine.ran == [[9999], [1, 2], [3, 4], [5]]


@virtual
async def test_a_full_queue_refuses_with_the_time_that_half_of_it_takes() -> None:
    stepped = Stepped(SteppedEngine(), max_queue=40)
    await measure(stepped, 0.25)
    await occupy(stepped)
    submit(stepped, *range(39))
    await stepped.turn()
    refused, fits = submit(stepped, 1, 2), submit(stepped, 3)
    await stepped.turn()
    refusal = refused.exception()
    assert isinstance(refusal, QueueFullError)
    assert refusal.headers["Retry-After"] == "5"
    assert not fits.done()


@virtual
async def test_clips_of_a_caller_that_left_are_not_run_and_free_their_place() -> None:
    engine = SteppedEngine()
    stepped = Stepped(engine, max_queue=3)
    await occupy(stepped)
    leaving = submit(stepped, 1, 2, 3)
    await stepped.turn()
    leaving.cancel()
    await stepped.turn()
    assert stepped.batcher.waiting == 0
    submit(stepped, 4, 5, 6)
    await stepped.finish()
    assert engine.ran == [[9999], [4, 5, 6]]


@virtual
async def test_logits_that_are_not_finite_are_an_error_of_their_request() -> None:
    class Broken(SteppedEngine):
        def run(self, frames: Frames) -> Outputs:
            logits, embedding = super().run(frames)
            return Outputs(np.where(logits == 13, np.nan, logits), embedding)

    stepped = Stepped(Broken())
    good, bad = submit(stepped, 1), submit(stepped, 13)
    await stepped.finish()
    assert logits(good) == [1]
    assert isinstance(bad.exception(), InternalError)


@virtual
async def test_the_age_of_the_queue_grows_while_an_engine_hangs_and_leavers_do_not_count() -> None:
    stepped = Stepped(SteppedEngine())
    await occupy(stepped)
    await stepped.wait(1)
    assert stepped.batcher.queue_age_s() == 0, "a batch that runs does not wait"
    waits = submit(stepped, 1)
    await stepped.turn()
    await stepped.wait(2)
    assert stepped.batcher.queue_age_s() == 2
    waits.cancel()
    await stepped.turn()
    assert stepped.batcher.queue_age_s() == 0


@virtual
async def test_closing_cancels_each_request_and_waits_for_the_batch_that_runs() -> None:
    stepped = Stepped(SteppedEngine())
    running, waits = submit(stepped, 1), submit(stepped, 2)
    await stepped.begin()
    closing = asyncio.ensure_future(stepped.batcher.close())
    await stepped.turn()
    assert running.cancelled()
    assert waits.cancelled()
    assert not closing.done()
    await stepped.end()
    assert closing.done()


def test_on_its_own_threads_it_answers_and_then_sleeps() -> None:
    async def answer() -> None:
        loop = asyncio.get_running_loop()
        batcher = Batcher([SteppedEngine(), SteppedEngine()], max_batch=4, max_queue=1000)
        batcher.start()
        wanted = [range(start, start + 5) for start in range(0, 100, 5)]
        answers = await asyncio.gather(*(batcher.submit(clips(*own)) for own in wanted))
        assert [[int(row[0]) for row in each.logits] for each in answers] == list(map(list, wanted))
        await batcher.idle()
        for _ in range(1000):  # an engine may still settle, once
            await asyncio.sleep(0.01)
            timers = loop._scheduled  # type: ignore[attr-defined]
            if all(timer.cancelled() for timer in timers):
                break
        else:
            pytest.fail("the batcher polls")
        await batcher.close()

    asyncio.run(answer())


@virtual
async def test_a_higher_priority_goes_first_and_a_low_one_is_not_left_behind() -> None:
    engine = SteppedEngine()
    stepped = Stepped(engine, max_batch=13)
    await occupy(stepped)
    for first, priority in ((300, "low"), (200, "normal"), (100, "high")):
        for value in range(first, first + 40):
            submit(stepped, value, priority=priority)
    await stepped.end()
    await stepped.step()
    await stepped.step()
    assert engine.ran[1][0] == 100, "the highest first, though it came last"
    batch = engine.ran[2]
    classes = [sum(first <= value < first + 100 for value in batch) for first in (100, 200, 300)]
    assert classes == [8, 4, 1]
    await stepped.finish()


def test_turns_that_a_class_did_not_need_are_not_saved_up() -> None:
    turns = Turns()
    loop = asyncio.new_event_loop()

    def add(priority: Priority, count: int) -> None:
        for _ in range(count):
            turns.add(Request(np.zeros((1, 1), np.uint8), loop.create_future(), 0.0, priority))

    add("low", 100)
    turns.take(100, 0.0)
    add("high", 50)
    add("low", 50)
    taken = [slot.request.priority for slot in turns.take(18, 0.0)]
    loop.close()
    assert 15 <= taken.count("high") <= 17


@virtual
async def test_what_is_late_is_not_run_and_its_caller_is_told_at_once() -> None:
    engine, events = SteppedEngine(), Dropped()
    stepped = Stepped(engine, events=events)
    await occupy(stepped)
    late = submit(stepped, 1, 2, deadline=stepped.loop.now + 0.5)
    patient = submit(stepped, 3, deadline=stepped.loop.now + 2)
    await stepped.turn()
    await stepped.wait(1)
    assert isinstance(late.exception(), DeadlineExceededError)
    assert stepped.batcher.waiting == 1
    assert events.reasons == ["deadline"]
    await stepped.finish()
    assert logits(patient) == [3]
    assert engine.ran == [[9999], [3]]


@virtual
async def test_a_batch_that_starts_before_the_late_one_is_told_leaves_it_out_all_the_same() -> None:
    engine, events = SteppedEngine(), Dropped()
    stepped = Stepped(engine, events=events)
    late = submit(stepped, 1, deadline=stepped.loop.now + 0.5)
    await stepped.turn()
    stepped.loop.now += 1
    stepped.threads[0].begin()  # before the event loop's timer
    await stepped.end()
    assert isinstance(late.exception(), DeadlineExceededError)
    assert engine.ran == []
    assert events.reasons == ["deadline"]


@virtual
async def test_what_cannot_be_done_in_time_is_refused_at_once_and_says_when_it_could() -> None:
    engine = SteppedEngine()
    stepped = Stepped(engine)
    await measure(stepped, 1.0)
    await occupy(stepped)
    submit(stepped, *range(10))
    await stepped.turn()
    # Turns are taken clip by clip: one clip has one of the others before it, two have two.
    fits = submit(stepped, 1, deadline=stepped.loop.now + 2.5)
    too_late = submit(stepped, 1, 2, deadline=stepped.loop.now + 2.5)
    ahead_of_them = submit(stepped, 1, priority="high", deadline=stepped.loop.now + 2.5)
    behind_them = submit(stepped, 1, priority="low", deadline=stepped.loop.now + 2.5)
    await stepped.turn()
    refusal = too_late.exception()
    assert isinstance(refusal, DeadlineUnreachableError)
    assert int(refusal.headers["Retry-After"]) == 3
    assert isinstance(behind_them.exception(), DeadlineUnreachableError)
    await stepped.finish()
    assert logits(fits) == logits(ahead_of_them) == [1]


@virtual
async def test_a_rate_from_bad_times_mends_since_nobody_is_refused_while_nothing_waits() -> None:
    stepped = Stepped(SteppedEngine())
    await measure(stepped, 1000.0)
    task = submit(stepped, 1, deadline=stepped.loop.now + 1)
    await stepped.step()
    assert logits(task) == [1]


@virtual
async def test_a_full_queue_makes_room_for_a_priority_that_has_less_than_its_share() -> None:
    events = Dropped()
    stepped = Stepped(SteppedEngine(), max_queue=13, events=events)
    await occupy(stepped)
    lows = [submit(stepped, value, priority="low") for value in range(13)]
    await stepped.turn()
    refused = submit(stepped, 50, priority="low")
    high = submit(stepped, *range(60, 65), priority="high")
    await stepped.turn()
    assert isinstance(refused.exception(), QueueFullError)
    assert stepped.batcher.waiting == 13
    assert events.reasons == ["displaced"] * 5
    assert all(isinstance(task.exception(), QueueFullError) for task in lows[8:])
    await stepped.finish()
    assert logits(high) == list(range(60, 65))
    assert [logits(task)[0] for task in lows[:8]] == list(range(8))


@virtual
async def test_a_flood_of_high_priority_leaves_the_others_their_share_of_the_queue() -> None:
    stepped = Stepped(SteppedEngine(), max_queue=26)
    await occupy(stepped)
    highs = [submit(stepped, value, priority="high") for value in range(26)]
    await stepped.turn()
    lows = [submit(stepped, 100 + value, priority="low") for value in range(3)]
    await stepped.turn()
    assert [task.done() for task in lows] == [False, False, True]  # 2 of 26 are its share
    assert sum(task.done() for task in highs) == 2
    await stepped.finish()


@virtual
async def test_a_second_batch_is_lined_up_behind_the_running_one_only_when_it_is_full() -> None:
    engine = SteppedEngine()
    stepped = Stepped(engine)
    await occupy(stepped)
    few = [submit(stepped, value) for value in range(3)]
    await stepped.turn()
    assert not stepped.threads[0].jobs
    few.append(submit(stepped, 3))
    await stepped.turn()
    assert len(stepped.threads[0].jobs) == 1
    submit(stepped, 4, 5, 6, 7, 8)
    await stepped.turn()
    assert len(stepped.threads[0].jobs) == 1, "one is enough"
    # What is in it is decided when it starts: a newcomer may overtake.
    assert stepped.batcher.waiting == 9
    submit(stepped, 100, priority="high")
    await stepped.turn()
    stepped.threads[0].end()  # before the event loop hears of it
    stepped.threads[0].begin()
    assert engine.ran == [[9999], [100, 0, 1, 2]]
    await stepped.finish()


@virtual
async def test_a_batch_that_was_lined_up_and_is_not_full_any_more_is_not_run() -> None:
    engine = SteppedEngine()
    stepped = Stepped(engine)
    await occupy(stepped)
    few = [submit(stepped, value) for value in range(4)]
    await stepped.turn()
    few[0].cancel()
    await stepped.turn()
    stepped.threads[0].end()
    stepped.threads[0].begin()
    assert engine.ran == [[9999]]
    await stepped.finish()
    assert engine.ran == [[9999], [1, 2, 3]]


@pytest.mark.parametrize(
    ("waiting", "taken"), [(1, 1), (7, 7), (8, 8), (19, 8), (20, 20), (31, 31), (40, 32)]
)
@virtual
async def test_batches_fill_the_sizes_that_the_engine_was_built_for(
    waiting: int, taken: int
) -> None:
    engine = SteppedEngine(batches=(1, 8, 32))
    stepped = Stepped(engine, max_batch=64)
    await occupy(stepped)
    submit(stepped, *range(waiting))
    await stepped.turn()
    await stepped.end()
    await stepped.step()
    assert len(engine.ran[1]) == taken
    await stepped.finish()


@virtual
async def test_an_engine_that_fails_on_what_another_can_do_is_taken_out_and_loses_nothing() -> None:
    broken, sound = SteppedEngine(fails=lambda batch: True), SteppedEngine()
    events = Dropped()
    stepped = Stepped(broken, sound, events=events)
    tasks = [submit(stepped, value) for value in range(8)]
    await stepped.finish()
    assert [logits(task) for task in tasks] == [[value] for value in range(8)]
    assert stepped.batcher.healthy == (False, True)
    assert events.removed == [0]
    ran = len(broken.ran)
    more = [submit(stepped, value) for value in range(8)]
    await stepped.finish()
    assert [logits(task) for task in more] == [[value] for value in range(8)]
    assert len(broken.ran) == ran


@virtual
async def test_clips_that_no_engine_can_do_are_nobodys_fault_but_theirs() -> None:
    engines = [SteppedEngine(fails=lambda batch: 13 in batch) for _ in range(2)]
    stepped = Stepped(*engines)
    for _ in range(5):
        poisoned = submit(stepped, 13)
        await stepped.finish()
        assert isinstance(poisoned.exception(), InternalError)
    good = [submit(stepped, value) for value in range(4)]
    await stepped.finish()
    assert [logits(task) for task in good] == [[0], [1], [2], [3]]
    assert all(engine.ran for engine in engines)
    assert not any(worker.removed for worker in stepped.batcher._workers)


@virtual
async def test_the_only_engine_is_kept_and_is_healthy_again_once_it_works() -> None:
    down = [True]
    stepped = Stepped(SteppedEngine(fails=lambda batch: down[0]))
    for _ in range(3):
        assert stepped.batcher.healthy == (True,)
        submit(stepped, 1)
        await stepped.finish()
    assert stepped.batcher.healthy == (False,)
    down[0] = False
    task = submit(stepped, 2)
    await stepped.finish()
    assert logits(task) == [2]
    assert stepped.batcher.healthy == (True,)


@virtual
async def test_an_engine_that_fails_is_tried_while_nobody_asks_until_it_works() -> None:
    down = [True]
    engine = SteppedEngine(fails=lambda batch: down[0])
    stepped = Stepped(engine, trial=clips(5))
    for _ in range(2):
        submit(stepped, 1)
        await stepped.finish()
    await stepped.wait(60)
    assert not stepped.threads[0].jobs, "one that does not fail on everything is left alone"
    submit(stepped, 1)
    await stepped.finish()
    assert stepped.batcher.healthy == (False,)
    for _ in range(2):
        assert not stepped.threads[0].jobs
        await stepped.wait(TRY_EVERY_S)
        assert await stepped.step()
        assert stepped.batcher.healthy == (False,)
    down[0] = False
    await stepped.wait(TRY_EVERY_S)
    assert await stepped.step()
    assert stepped.batcher.healthy == (True,)
    assert engine.ran[3:] == [[5]] * 3
    await stepped.wait(60)
    assert not stepped.threads[0].jobs, "once it works it is left alone"
    assert stepped.batcher.running == (0,)


@virtual
async def test_an_engine_that_fails_is_not_tried_beside_requests_and_not_after_the_end() -> None:
    engine = SteppedEngine(fails=lambda batch: batch == [1])
    stepped = Stepped(engine, trial=clips(5))
    for _ in range(3):
        submit(stepped, 1)
        await stepped.finish()
    task = submit(stepped, 2)
    assert await stepped.begin()
    await stepped.wait(TRY_EVERY_S)
    assert not stepped.threads[0].jobs
    await stepped.end()
    assert logits(task) == [2]
    await stepped.wait(TRY_EVERY_S)
    assert not stepped.threads[0].jobs, "the request has shown that it works"
    for _ in range(3):
        submit(stepped, 1)
        await stepped.finish()
    await stepped.batcher.close()
    await stepped.wait(TRY_EVERY_S)
    assert [5] not in engine.ran


@virtual
async def test_the_time_of_a_batch_leaves_out_what_the_engine_spent_on_the_one_before() -> None:
    seconds: list[float] = []

    class Timed(Events):
        def batch_ended(self, engine: int, took: float) -> None:
            seconds.append(took)

    stepped = Stepped(SteppedEngine(slots=2), max_batch=1, events=Timed())
    submit(stepped, 1), submit(stepped, 2)
    await stepped.begin()
    stepped.loop.now += 1
    await stepped.begin()
    stepped.loop.now += 2
    await stepped.end()
    stepped.loop.now += 4
    await stepped.end()
    assert seconds == [3, 4]


@virtual
async def test_room_is_kept_for_clips_that_are_being_decoded_and_given_back() -> None:
    stepped = Stepped(SteppedEngine(), max_batch=1, max_queue=5)
    await occupy(stepped)
    waits = submit(stepped, 0)
    await stepped.turn()
    with stepped.batcher.reserved(3) as release:
        stepped.batcher.check_room(1)
        with pytest.raises(QueueFullError):
            stepped.batcher.check_room(2)
        with pytest.raises(QueueFullError), stepped.batcher.reserved(2):
            pass
        release()
        task = submit(stepped, 1, 2, 3)
        await asyncio.sleep(0)
        stepped.batcher.check_room(1)
    with pytest.raises(QueueFullError):
        stepped.batcher.check_room(2)  # the three wait now; leaving the block took nothing back
    await stepped.finish()
    assert [logits(waits), logits(task)] == [[0], [1, 2, 3]]
    stepped.batcher.check_room(5)


@virtual
async def test_what_other_classes_decode_counts_no_further_than_their_share() -> None:
    # The shares of 26 are 16, 8 and 2.
    stepped = Stepped(SteppedEngine(), max_queue=26)
    await occupy(stepped)
    submit(stepped, 1, priority="high")
    await stepped.turn()
    with stepped.batcher.reserved(25, "low"):
        stepped.batcher.check_room(23, "high")
        stepped.batcher.check_room(23, "normal")
        with pytest.raises(QueueFullError):
            stepped.batcher.check_room(24, "normal")
        with pytest.raises(QueueFullError):
            stepped.batcher.check_room(1, "low")
        with stepped.batcher.reserved(8, "normal"):
            stepped.batcher.check_room(15, "high")
            with pytest.raises(QueueFullError):
                stepped.batcher.check_room(16, "high")


@virtual
async def test_what_is_being_decoded_does_not_turn_away_clips_that_are_there() -> None:
    stepped = Stepped(SteppedEngine(), max_batch=1, max_queue=4)
    await occupy(stepped)
    waits = [submit(stepped, 1)]
    await stepped.turn()
    serving = SimpleNamespace(batcher=stepped.batcher, bundle="its bundle")
    host = SimpleNamespace(candidates=SimpleNamespace(serving=serving))
    network = Network(SimpleNamespace(find=lambda name: host))  # type: ignore[arg-type]
    with stepped.batcher.reserved(3):
        for clip in (2, 3, 4):
            assert network.find(Wanted("demo"), "normal") == "its bundle"
            waits.append(submit(stepped, clip))
            await stepped.turn()
        with pytest.raises(QueueFullError):
            network.find(Wanted("demo"), "normal")
    await stepped.finish()
    assert [logits(each) for each in waits] == [[1], [2], [3], [4]]


@virtual
async def test_when_to_come_again_takes_what_is_being_decoded_into_account() -> None:
    stepped = Stepped(SteppedEngine(), max_batch=1, max_queue=10)
    await measure(stepped, 1.0)
    await occupy(stepped)
    submit(stepped, 1, 2)
    await stepped.turn()
    with stepped.batcher.reserved(8), pytest.raises(QueueFullError) as refusal:
        stepped.batcher.check_room(1)
    assert int(refusal.value.headers["Retry-After"]) == 5
