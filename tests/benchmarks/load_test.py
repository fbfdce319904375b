"""A running service under an open load, beside what the simulator says of it.

    python -m tests.benchmarks.load_test [--rates 4 8 12 15 18 24] [--seconds 40]

Requests come at random times, whether or not those before were answered, over real sockets to the
real app. Decoders and engine do not compute: they sleep for the times that are given, as a GPU and
cores of their own would take, so that what is compared is the queueing, and not the cores that this
machine shares. HTTP takes what it takes: its median for a lone request is what the simulator adds.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import statistics
import time
from multiprocessing.connection import Connection

import numpy as np
import uvicorn
import uvloop
from numpy.typing import NDArray

from export.runtime import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from model.demo import SAMPLE_CLIP, STORE
from model.video import Clips, load_clips
from service.app import create_app
from service.decoding.messages import DecodeRequest
from service.decoding.pool import DecoderPool
from service.loading import find_bundle
from service.settings import Settings, load_settings
from tests.benchmarks.queue_simulator import (
    BatchCurve,
    Result,
    Service,
    drawn_from,
    simulate,
)

# Long against what HTTP takes, so that a busy machine moves little.
DECODE_S = (0.05, 0.10, 0.15, 0.20, 0.50)
"""Each as likely: mean 0.2, as files of different kinds take."""
DECODERS = 4
BATCHES = BatchCurve((1, 8), (0.19, 0.47))
MAX_BATCH, MAX_QUEUE = 8, 32


def main() -> None:
    """Prints a pair of lines for each rate: measured and simulated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[4, 8, 12, 15, 18, 24])
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    settings = load_settings(
        device="cpu",
        store=str(STORE),
        model="demo",
        log_level="error",
        decode_workers=DECODERS,
        max_batch_clips=MAX_BATCH,
        max_queue_clips=MAX_QUEUE,
    )
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    service = multiprocessing.get_context("spawn").Process(
        target=run_service, args=(settings, theirs)
    )
    service.start()
    try:
        port = ours.recv()
        overhead = lone(port)
        model = Service(
            decode_s=drawn_from(DECODE_S),
            decoders=DECODERS,
            batch_s=BATCHES,
            max_batch=MAX_BATCH,
            max_queue=MAX_QUEUE,
            overhead_s=overhead,
        )
        print(f"HTTP and the rest of a lone request: {overhead * 1e3:.0f} ms")
        print("rate             videos/s  refused   mean ms   p50 ms   p95 ms   clips a batch")
        for rate in options.rates:
            measured = asyncio.run(load(port, rate, options.seconds))
            print(row(rate, "measured", measured), flush=True)
            print(row(rate, "simulated", simulated(model, rate, options.seconds)), flush=True)
    finally:
        ours.send("stop")
        service.join()


def simulated(model: Service, rate: float, seconds: float) -> Result:
    """Twenty runs as long as the measured one: where more comes than is done, length matters."""
    runs = [simulate(model, rate, round(rate * seconds), seed=seed) for seed in range(20)]
    return Result(
        latencies=[latency for run in runs for latency in run.latencies],
        **{
            name: sum(getattr(run, name) for run in runs)
            for name in ("refused", "batches", "batch_clips", "seconds", "done_in_time")
        },
    )


def row(rate: float, what: str, result: Result) -> str:
    return (
        f"{rate:4g} {what:10}  {result.throughput:10.1f}  {result.refused_share:7.1%} "
        f"{result.mean * 1e3:9.0f} {result.percentile(0.5) * 1e3:8.0f} "
        f"{result.percentile(0.95) * 1e3:8.0f} {result.mean_batch:15.1f}"
    )


def run_service(settings: Settings, connection: Connection) -> None:
    """The real app with decoders and an engine that sleep; says its port, stops when told."""
    bundle = find_bundle(settings)
    clips = load_clips(SAMPLE_CLIP, bundle.config.preprocessing)
    classes, dim = bundle.config.num_classes, bundle.config.embed_dim
    draw, rng = drawn_from(DECODE_S), random.Random(1)
    free: list[asyncio.Semaphore] = []

    async def decode(pool: DecoderPool, job: DecodeRequest) -> Clips:
        if not free:
            free.append(asyncio.Semaphore(DECODERS))
        async with free[0]:
            await asyncio.sleep(draw(rng))
        return clips

    def run(runtime: OnnxRuntime, frames: NDArray[np.uint8]) -> Outputs:
        time.sleep(BATCHES(len(frames)))
        shapes = ((len(frames), classes), (len(frames), dim))
        return Outputs(*(np.zeros(shape, np.float32) for shape in shapes))

    DecoderPool.decode = decode  # type: ignore[method-assign]
    OnnxRuntime.run = run  # type: ignore[method-assign]
    server = uvicorn.Server(
        uvicorn.Config(create_app(settings), port=0, log_config=None, access_log=False)
    )

    async def serve() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        connection.send(server.servers[0].sockets[0].getsockname()[1])
        await asyncio.to_thread(connection.recv)
        server.should_exit = True
        await serving

    uvloop.run(serve())


def lone(port: int) -> float:
    """Median latency of requests one after the other, less the times that are known, in seconds."""

    async def ask() -> list[float]:
        taken = []
        for _ in range(25):
            started = time.perf_counter()
            await request(port)
            taken.append(time.perf_counter() - started)
        return taken

    known = statistics.median(DECODE_S) + BATCHES(1)
    return max(0.0, statistics.median(asyncio.run(ask())) - known)


async def load(port: int, rate: float, seconds: float) -> Result:
    """Arrivals at `rate` a second; the first tenth does not count, as in the simulator."""
    rng = random.Random(2)
    result = Result(seconds=seconds * 0.9)
    began = time.perf_counter()
    from_, until = began + seconds * 0.1, began + seconds
    before = await batches(port)

    async def one() -> None:
        started = time.perf_counter()
        status = await request(port)
        ended = time.perf_counter()
        if started < from_:
            return
        if status == 503:
            result.refused += 1
            return
        if status != 200:
            raise RuntimeError(f"the service answered {status}")
        result.latencies.append(ended - started)
        result.done_in_time += ended <= until

    asked: list[asyncio.Task[None]] = []
    at = began
    while (at := at + rng.expovariate(rate)) < until:
        await asyncio.sleep(at - time.perf_counter())
        asked.append(asyncio.create_task(one()))
    after = await batches(port)
    result.batches, result.batch_clips = (
        late - early for late, early in zip(after, before, strict=True)
    )
    await asyncio.gather(*asked)
    return result


async def request(port: int) -> int:
    """Posts a body; the status of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: 10000\r\n\r\n".encode() + bytes(10_000))
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1])


async def batches(port: int) -> tuple[float, float]:
    """How many batches there were, and clips in them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    values = {"count": 0.0, "sum": 0.0}
    for line in text.splitlines():
        for end in values:
            if line.startswith(f"timesformer_batch_clips_{end}"):
                values[end] += float(line.split()[-1])
    return values["count"], values["sum"]


if __name__ == "__main__":
    main()
