"""How much of the engine's own speed the service keeps: clips a second over HTTP against a loop.

    python -m tests.benchmarks.serving [--concurrency 16] [--seconds 4] [--rounds 5]

Both sides use the same ONNX session options and the same clip. Decoding is left out of both: the
service's decoder is replaced by one that hands out the clip at once, so that what is measured is
HTTP, upload, batching and the answer. Rounds alternate, and the ratio is taken round by round,
since the machine may be shared. With `--decode` the service decodes for real, to show what that
costs on cores that inference wants too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import uvicorn
import uvloop

from export.runtime import load_runtime
from model.demo import SAMPLE_CLIP, STORE
from model.video import load_clips
from service.decoding.messages import DecodeRequest
from service.decoding.pool import DecoderPool
from service.registry.loading import find_bundle
from service.server.app import create_app
from service.settings import Settings, load_settings


def main() -> None:
    """Prints a line per round and the medians."""
    options = parse()
    settings = load_settings(device="cpu", port=0, log_level="warning", **_store(options))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    service = context.Process(target=run_service, args=(settings, options.decode, theirs))
    service.start()
    port = ours.recv()
    engine = Engine(settings)
    print(f"{engine.name}; {options.concurrency} clients; decoding {options.decode}")
    print("bare loop clips/s   service clips/s   ratio   p50 ms   p99 ms")
    ratios = []
    try:
        asyncio.run(load(port, options.concurrency, 1.0))
        for _ in range(options.rounds):
            bare = engine.clips_per_second(options.seconds)
            started = time.perf_counter()
            latencies = asyncio.run(load(port, options.concurrency, options.seconds))
            served = len(latencies) / (time.perf_counter() - started)
            ratios.append(served / bare)
            middle, worst = (percentile(latencies, p) * 1e3 for p in (0.5, 0.99))
            print(
                f"{bare:17.1f}   {served:15.1f}   {ratios[-1]:5.2f}   {middle:6.1f}   {worst:6.1f}"
            )
    finally:
        ours.send("stop")
        service.join()
    print(f"median ratio {statistics.median(ratios):.2f} of {options.rounds} rounds")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", help="bundle store; the demo model's by default")
    parser.add_argument("--model")
    parser.add_argument("--decode", action="store_true", help="decode for real")
    return parser.parse_args()


def _store(options: argparse.Namespace) -> dict[str, str]:
    return {"store": options.store or str(STORE), "model": options.model or "demo"}


class Engine:
    """The bundle's session by itself."""

    def __init__(self, settings: Settings) -> None:
        bundle = find_bundle(settings)
        self.name = f"{bundle.name} version {bundle.version}"
        self._runtime = load_runtime(bundle, "cpu")
        self._clips = load_clips(SAMPLE_CLIP, bundle.config.preprocessing).frames
        # Whatever batch size is fastest for the loop is what the service has to keep up with.
        self._batch = max((1, 2, 4, 8, 16), key=lambda size: self._rate(size, 1.0))

    def clips_per_second(self, seconds: float) -> float:
        return self._rate(self._batch, seconds)

    def _rate(self, size: int, seconds: float) -> float:
        frames = self._clips.repeat(size, axis=0)
        self._runtime.run(frames)
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            self._runtime.run(frames)
            done += size
        return done / (time.perf_counter() - started)


def run_service(settings: Settings, decode: bool, connection: Connection) -> None:
    """The real app in a process of its own; says its port, stops when told."""
    if not decode:
        config = find_bundle(settings).config
        ready = load_clips(SAMPLE_CLIP, config.preprocessing)

        async def hand_out(pool: DecoderPool, job: DecodeRequest) -> object:
            return ready

        DecoderPool.decode = hand_out  # type: ignore[method-assign,assignment]
    server = uvicorn.Server(
        uvicorn.Config(create_app(settings), port=0, log_config=None, access_log=False)
    )

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        connection.send(server.servers[0].sockets[0].getsockname()[1])
        await asyncio.to_thread(connection.recv)
        server.should_exit = True
        await serving

    uvloop.run(run())  # as `timesformer serve` does


def video_request() -> bytes:
    """As it goes over the wire."""
    body = SAMPLE_CLIP.read_bytes()
    return (
        b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: video/mp4\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body


async def load(
    port: int, clients: int, seconds: float, request: bytes | None = None
) -> list[float]:
    """A closed loop of clients over keep-alive connections; the latencies of what was answered.

    Args:
        request: by default that of the demo model's clip.
    """
    request = request or video_request()
    until = time.perf_counter() + seconds
    latencies: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (started := time.perf_counter()) < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
            answer = await reader.readexactly(length)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the service refused: {json.loads(answer)}")
            latencies.append(time.perf_counter() - started)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
