"""What latency and throughput to expect of a service: arrivals, decoders, queue, batches, engines.

    python -m tests.benchmarks.queue_simulator --rate 100 --clips 1 --decode 0.3 --decoders 40 \
        --batches 1:0.010,8:0.030,16:0.052 --engines 2

Videos arrive at random times (Poisson) and wait for one of the decoders, each of which takes one
video at a time; their clips then wait in one queue, of which each engine that is idle takes as many
as a batch may have, videos in turn, clip by clip (`service/batcher.py`). After a batch of more than
one clip an engine waits up to `settle_s` for as many again. A video whose clips do not fit into the
queue is refused. The times are given: whoever has no GPU puts in what one would need.

Left out: the cores that decoders, engines and HTTP share on a small machine, and the network.
`load_test.py` compares this with a running service.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Draw = Callable[[random.Random], float]


@dataclass(frozen=True)
class Service:
    """What is simulated. Times in seconds."""

    decode_s: Draw
    """of one video on one decoder"""
    decoders: int
    batch_s: Callable[[int], float]
    """of a batch of so many clips on one engine"""
    max_batch: int
    engines: int = 1
    max_queue: int = 256
    """clips"""
    settle_s: float = 0.002
    overhead_s: float = 0.0
    """of each video for all the rest: upload, HTTP, the answer"""


@dataclass
class Result:
    """What came out, of the videos that arrived after the first tenth."""

    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    batches: float = 0
    batch_clips: float = 0
    """in these batches"""
    decoding_s: float = 0.0
    inferring_s: float = 0.0
    seconds: float = 0.0
    done_in_time: int = 0
    """videos that were answered while others still arrived"""

    @property
    def throughput(self) -> float:
        """Videos a second."""
        return self.done_in_time / self.seconds

    @property
    def refused_share(self) -> float:
        return self.refused / max(1, self.refused + len(self.latencies))

    @property
    def mean_batch(self) -> float:
        return self.batch_clips / max(1, self.batches)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    @property
    def mean(self) -> float:
        return sum(self.latencies) / max(1, len(self.latencies))


class _Video:
    def __init__(self, arrived: float, clips: int, counts: bool) -> None:
        self.arrived = arrived
        self.waiting = clips
        self.missing = clips
        self.counts = counts


def simulate(service: Service, rate: float, videos: int, clips: int = 1, seed: int = 0) -> Result:
    """Runs `videos` arrivals at `rate` a second through a service that is empty at first."""
    return _Run(service, rate, videos, clips, seed).result


class _Run:
    def __init__(self, service: Service, rate: float, videos: int, clips: int, seed: int) -> None:
        self.service = service
        self.random = random.Random(seed)
        self.result = Result()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()  # events at the same time happen as they were planned
        self.now = 0.0
        self.free_decoders = service.decoders
        self.to_decode: deque[_Video] = deque()
        self.queue: deque[_Video] = deque()
        self.waiting = 0
        self.idle = list(range(service.engines))
        self.settling: dict[int, int] = {}
        """Engines that wait for so many clips."""
        self.settle_round = [0] * service.engines
        times = list(itertools.accumulate(self.random.expovariate(rate) for _ in range(videos)))
        self.first, self.last = times[videos // 10], times[-1]
        self.result.seconds = self.last - self.first
        for time in times:
            self.at(time, lambda time=time: self.arrive(_Video(time, clips, time >= self.first)))
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()

    def at(self, time: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), happen))

    def arrive(self, video: _Video) -> None:
        self.to_decode.append(video)
        self.decode()

    def decode(self) -> None:
        while self.free_decoders and self.to_decode:
            video = self.to_decode.popleft()
            self.free_decoders -= 1
            seconds = self.service.decode_s(self.random)
            self.result.decoding_s += self.overlap(seconds)
            self.at(self.now + seconds, lambda video=video: self.decoded(video))

    def decoded(self, video: _Video) -> None:
        self.free_decoders += 1
        self.decode()
        if self.waiting + video.waiting > self.service.max_queue:
            self.result.refused += video.counts
            return
        self.queue.append(video)
        self.waiting += video.waiting
        self.wake()

    def wake(self) -> None:
        for engine, wanted in list(self.settling.items()):
            if self.waiting >= wanted:
                self.take(engine)
        while self.idle and self.waiting:
            self.take(self.idle.pop())

    def take(self, engine: int) -> None:
        """The next batch of an engine: waiting videos take turns, one clip each."""
        self.settling.pop(engine, None)
        self.settle_round[engine] += 1
        batch: list[_Video] = []
        while self.queue and len(batch) < self.service.max_batch:
            video = self.queue.popleft()
            batch.append(video)
            video.waiting -= 1
            if video.waiting:
                self.queue.append(video)
        self.waiting -= len(batch)
        if not batch:
            self.idle.append(engine)
            return
        seconds = self.service.batch_s(len(batch))
        self.result.inferring_s += self.overlap(seconds)
        if self.first <= self.now <= self.last:
            self.result.batches += 1
            self.result.batch_clips += len(batch)
        self.at(self.now + seconds, lambda: self.done(engine, batch))

    def done(self, engine: int, batch: list[_Video]) -> None:
        for video in batch:
            video.missing -= 1
            if video.missing == 0 and video.counts:
                self.result.latencies.append(self.now - video.arrived + self.service.overhead_s)
                self.result.done_in_time += self.now <= self.last
        size = len(batch)
        if size > 1 and self.service.settle_s and self.waiting < size:
            self.settling[engine] = size
            round_ = self.settle_round[engine]
            self.at(self.now + self.service.settle_s, lambda: self.settled(engine, round_))
        elif self.waiting:
            self.take(engine)
        else:
            self.idle.append(engine)

    def settled(self, engine: int, round_: int) -> None:
        if engine in self.settling and self.settle_round[engine] == round_:
            self.take(engine)

    def overlap(self, seconds: float) -> float:
        """How much of a span from now on lies in the time that counts."""
        return max(0.0, min(self.now + seconds, self.last) - max(self.now, self.first))


def constant(seconds: float) -> Draw:
    return lambda random: seconds


def exponential(mean: float) -> Draw:
    return lambda random: random.expovariate(1 / mean)


def drawn_from(measured: Sequence[float]) -> Draw:
    return lambda random: random.choice(measured)


class BatchCurve(NamedTuple):
    """Seconds of a batch by its size, straight between the sizes that were measured."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, clips: int) -> float:
        right = bisect_left(self.sizes, clips)
        if right < len(self.sizes) and self.sizes[right] == clips:
            return self.seconds[right]
        if len(self.sizes) == 1:
            return self.seconds[0] * clips / self.sizes[0]
        # Beyond the ends as between the two points that are next.
        right = min(max(right, 1), len(self.sizes) - 1)
        (x, y), (x2, y2) = (
            (self.sizes[index], self.seconds[index]) for index in (right - 1, right)
        )
        return y + (y2 - y) * (clips - x) / (x2 - x)

    @classmethod
    def parse(cls, text: str) -> BatchCurve:
        """`1:0.010,8:0.030`"""
        points = sorted(
            (int(size), float(seconds))
            for size, seconds in (point.split(":") for point in text.split(","))
        )
        sizes, seconds = zip(*points, strict=True)
        return cls(sizes, seconds)


COLUMNS = (
    "rate  videos/s  refused   p50 ms   p95 ms   p99 ms   clips a batch   decoders busy   "
    "engines busy"
)


def line(service: Service, rate: float, result: Result) -> str:
    """One row under `COLUMNS`."""
    decoding = result.decoding_s / result.seconds / service.decoders
    inferring = result.inferring_s / result.seconds / service.engines
    p50, p95, p99 = (result.percentile(share) * 1e3 for share in (0.5, 0.95, 0.99))
    return (
        f"{rate:4g}  {result.throughput:8.1f}  {result.refused_share:7.1%} {p50:8.0f} {p95:8.0f} "
        f"{p99:8.0f}   {result.mean_batch:13.1f}   {decoding:13.0%}   {inferring:12.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="videos a second")
    parser.add_argument("--videos", type=int, default=20_000)
    parser.add_argument("--clips", type=int, default=1, help="of a video: views x crops")
    parser.add_argument("--decode", type=float, required=True, help="seconds of a core")
    parser.add_argument("--decoders", type=int, required=True)
    parser.add_argument("--batches", type=BatchCurve.parse, required=True, help="1:0.010,8:0.030")
    parser.add_argument("--max-batch", type=int, help="by default the largest of --batches")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--max-queue", type=int, default=256, help="clips")
    options = parser.parse_args()
    service = Service(
        decode_s=exponential(options.decode),
        decoders=options.decoders,
        batch_s=options.batches,
        max_batch=options.max_batch or options.batches.sizes[-1],
        engines=options.engines,
        max_queue=options.max_queue,
    )
    print(COLUMNS)
    for rate in options.rate:
        print(line(service, rate, simulate(service, rate, options.videos, options.clips)))


if __name__ == "__main__":
    main()
