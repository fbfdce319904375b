"""The batcher's invariants, for any order of arrivals, batches, failures, leavers and deadlines.

In virtual time, with engines that are stepped: see `stepped.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any, NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    InternalError,
    QueueFullError,
)
from service.inference.batcher import Batcher
from service.inference.engine_worker import Events
from service.inference.scheduler import MOST_BETWEEN, PRIORITIES, WEIGHTS, Priority
from tests.service.inference.stepped import Stepped, SteppedEngine, clips, virtual

REFUSALS = (DeadlineExceededError, DeadlineUnreachableError, QueueFullError)


class Arrive(NamedTuple):
    size: int
    priority: Priority
    timeout: float | None
    poisoned: bool


class Begin(NamedTuple):
    engine: int


class End(NamedTuple):
    engine: int


class Wait(NamedTuple):
    seconds: float


class Leave(NamedTuple):
    which: int


class Decode(NamedTuple):
    size: int
    priority: Priority


class Decoded(NamedTuple):
    which: int
    broken: bool


ARRIVALS = st.builds(
    Arrive,
    st.integers(1, 9),
    st.sampled_from(PRIORITIES),
    st.none() | st.sampled_from([0.01, 0.1, 1.0]),
    st.sampled_from([False] * 9 + [True]),
)
HAPPENINGS = st.lists(
    ARRIVALS
    | st.builds(Begin, st.integers(0, 2))
    | st.builds(End, st.integers(0, 2))
    | st.builds(Wait, st.sampled_from([0.001, 0.005, 0.05, 0.5]))
    | st.builds(Leave, st.integers(0, 40))
    | st.builds(Decode, st.integers(1, 9), st.sampled_from(PRIORITIES))
    | st.builds(Decoded, st.integers(0, 8), st.booleans()),
    max_size=60,
)


class Counted(Events):
    def __init__(self) -> None:
        self.started: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.dropped: Counter[str] = Counter()
        self.removed: list[int] = []

    def batch_started(self, engine: int, clips: int) -> None:
        self.started[engine] += 1

    def batch_ended(self, engine: int, seconds: float) -> None:
        assert seconds >= 0
        self.ended[engine] += 1

    def request_dropped(self, reason: str) -> None:
        self.dropped[reason] += 1

    def engine_removed(self, engine: int) -> None:
        self.removed.append(engine)


class Caller:
    """One request, and all that became of it."""

    def __init__(self, batcher: Batcher, first: int, arrival: Arrive, now: float) -> None:
        self.values = list(range(first, first + arrival.size))
        self.poisoned = arrival.poisoned
        self.deadline = None if arrival.timeout is None else now + arrival.timeout
        self.left = False
        self.outcomes: list[Any] = []
        self.task = asyncio.ensure_future(self._submit(batcher, arrival.priority))

    async def _submit(self, batcher: Batcher, priority: Priority) -> None:
        try:
            answer = await batcher.submit(clips(*self.values), priority, self.deadline)
            self.outcomes.append([int(row[0]) for row in answer.logits])
            assert (answer.embedding == answer.logits * 2).all()
            assert answer.queue_s >= 0
            assert answer.inference_s >= 0
        except (*REFUSALS, InternalError) as error:
            self.outcomes.append(error)
        except asyncio.CancelledError:
            self.outcomes.append("left")


class Video:
    """One that has a decoder, and keeps room for its clips."""

    def __init__(self, batcher: Batcher, decode: Decode, max_queue: int) -> None:
        self.decode = decode
        self._kept = contextlib.ExitStack()
        turns, (size, own) = batcher._turns, decode
        coming = dict(turns.coming)
        try:
            self.release = self._kept.enter_context(batcher.reserved(*decode))
        except QueueFullError:
            self.refused = True
            assert turns.waiting, "an idle engine refuses nobody"
            assert turns.waiting + sum(coming.values()) + size > max_queue
            share = max_queue * WEIGHTS[own] // sum(WEIGHTS.values())
            if turns._clips[own] + coming[own] + size <= share:
                # Then it is for want of room now, whatever others decode.
                assert turns.waiting + coming[own] + size > max_queue
        else:
            self.refused = False
            assert turns.coming[own] == coming[own] + size

    def end(self) -> None:
        self._kept.close()


@given(
    happenings=HAPPENINGS,
    engines=st.integers(1, 3),
    slots=st.integers(1, 2),
    batches=st.sampled_from([(), (1, 2, 4), (1, 3, 8)]),
    max_batch=st.integers(1, 6),
    max_queue=st.integers(9, 40),
    broken=st.sets(st.integers(0, 2)),
)
@example(  # a batch fails of which nothing is wanted any more
    happenings=[
        Arrive(1, "high", None, False),
        Begin(0),
        Arrive(1, "high", 0.01, False),
        Arrive(1, "high", 0.01, False),
        Begin(0),
        Wait(0.05),
    ],
    engines=1,
    slots=2,
    batches=(),
    max_batch=2,
    max_queue=9,
    broken={0},
)
@settings(max_examples=200)
@virtual
async def test_every_request_is_answered_once_and_right_whatever_happens(
    happenings: list[Arrive | Begin | End | Wait | Leave | Decode | Decoded],
    engines: int,
    slots: int,
    batches: tuple[int, ...],
    max_batch: int,
    max_queue: int,
    broken: set[int],
) -> None:
    poison: set[int] = set()
    own = [
        SteppedEngine(
            lambda batch, index=index: index in broken or not poison.isdisjoint(batch),
            slots,
            batches,
        )
        for index in range(engines)
    ]
    events = Counted()
    stepped = Stepped(*own, max_batch=max_batch, max_queue=max_queue, events=events)
    callers: list[Caller] = []
    videos: list[Video] = []
    following = 0
    for happening in happenings:
        match happening:
            case Arrive(size):
                if happening.poisoned:
                    poison.add(following)
                callers.append(Caller(stepped.batcher, following, happening, stepped.loop.now))
                following += size
                await stepped.turn()
            case Begin(engine):
                await stepped.begin(engine % engines)
            case End(engine):
                await stepped.end(engine % engines)
            case Wait(seconds):
                await stepped.wait(seconds)
            case Leave(which) if callers:
                caller = callers[which % len(callers)]
                caller.left |= not caller.task.done()
                caller.task.cancel()
                await stepped.turn()
            case Decode():
                videos.append(Video(stepped.batcher, happening, max_queue))
                if videos[-1].refused:
                    videos.pop()
            case Decoded(which, is_broken) if videos:
                video = videos.pop(which % len(videos))
                if not is_broken:
                    video.release()
                    arrival = Arrive(*video.decode, None, poisoned=False)
                    callers.append(Caller(stepped.batcher, following, arrival, stepped.loop.now))
                    following += arrival.size
                    await stepped.turn()
                video.end()
        coming = stepped.batcher._turns.coming
        assert coming == {
            own: sum(video.decode.size for video in videos if video.decode.priority == own)
            for own in PRIORITIES
        }
        assert 0 <= stepped.batcher.waiting <= max_queue
        assert stepped.batcher._promised >= 0
    await stepped.finish()

    assert stepped.batcher.waiting == stepped.batcher._promised == 0
    assert stepped.batcher.queue_age_s() == 0
    assert not stepped.batcher._unanswered
    assert not stepped.batcher._retries
    assert events.started == events.ended
    assert all(running == 0 for running in stepped.batcher.running)
    fine = set(range(engines)) - broken
    for caller in callers:
        (outcome,) = caller.outcomes
        if isinstance(outcome, list):
            assert outcome == caller.values
            assert not caller.poisoned
        elif isinstance(outcome, InternalError):
            assert caller.poisoned or not fine, "an engine that works could have done it"
        elif isinstance(outcome, DeadlineExceededError):
            assert caller.deadline is not None
        elif outcome == "left":
            assert caller.left
    for engine in own:
        assert all(0 < len(batch) <= max_batch for batch in engine.ran)
    # No clip is run twice on an engine that has not failed on it.
    if not broken and not poison:
        ran = Counter(value for engine in own for batch in engine.ran for value in batch)
        assert max(ran.values(), default=0) <= 1
    assert set(events.removed) <= broken
    assert len(set(events.removed)) == len(events.removed) < engines
    await stepped.batcher.close()


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    priorities=st.lists(st.sampled_from(PRIORITIES), min_size=12, max_size=12),
    max_batch=st.integers(1, 6),
    waiting=st.sampled_from(PRIORITIES),
    size=st.integers(1, 3),
)
@settings(max_examples=60)
@virtual
async def test_nobody_waits_for_more_than_a_bounded_number_of_clips_however_many_come(
    sizes: list[int],
    priorities: list[Priority],
    max_batch: int,
    waiting: Priority,
    size: int,
) -> None:
    """A request starts once those before it in its class had a turn each, and other classes theirs
    between, though requests of all classes never stop coming.
    """

    engine = SteppedEngine()
    stepped = Stepped(engine, max_batch=max_batch, max_queue=100_000)
    tasks = []

    def arrive(values: list[int], priority: Priority) -> None:
        tasks.append(asyncio.ensure_future(stepped.batcher.submit(clips(*values), priority)))

    for own, priority in zip(sizes, priorities, strict=False):
        arrive([0] * own, priority)
    await stepped.turn()
    ahead = sum(priority == waiting for _, priority in zip(sizes, priorities, strict=False))
    done = len(engine.ran)
    arrive([7] * size, waiting)
    bound = (ahead + 1) * (MOST_BETWEEN[waiting] + 1) + 2 * max_batch
    clips_before = 0
    while True:
        for priority in PRIORITIES:
            arrive([0] * max_batch, priority)
        assert await stepped.step()
        newest = [value for batch in engine.ran[done:] for value in batch]
        if 7 in newest:
            break
        clips_before = len(newest)
        assert clips_before <= bound, "starved"
    for task in tasks:
        task.cancel()
    await stepped.finish()
