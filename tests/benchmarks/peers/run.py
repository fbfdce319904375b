"""The service beside LitServe, BentoML and Ray Serve, all serving one ONNX engine; one run.

    make bench-peers        or        python -m tests.benchmarks.peers.run --help

Clips are sent ready: to the service as Open Inference Protocol v2 with binary tensors, to peers in
what they take bytes in. One load generator for all, a closed loop over keep-alive connections: wrk,
or where that is not installed a slower one in Python, which shares the cores with what it measures.
Rounds go from server to server and start with the engine in a bare loop, so that a neighbour on the
machine meets them all; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from export.bundle.bundle import BundleStore
from export.bundle.manifest import ONNX_FLOAT32
from export.runtime.cores import usable_cores
from export.runtime.onnxruntime import OnnxRuntime

HERE = Path(__file__).parent
PEERS = ("service", "litserve", "bentoml", "ray")


class Recipe(NamedTuple):
    """How a model is measured, unless it is said."""

    peers: tuple[str, ...] = PEERS
    concurrency: int = 16
    seconds: float = 4.0
    max_batch: int = 2
    """The service's own default on a CPU."""
    batches: tuple[int, ...] = (1, 2, 4)
    """Of the bare loop."""
    generator: str = "wrk" if shutil.which("wrk") else "python"


RECIPES = {
    "toy": Recipe(max_batch=16, batches=(1, 4, 16, 32)),
    "tiny": Recipe(seconds=10),
    # wrk does not count what is under way at the end, which is much where a second has one clip.
    "base": Recipe(("service",), 4, seconds=30, batches=(1, 2), generator="python"),
}


class Post(NamedTuple):
    """The request that a server takes."""

    path: str
    headers: dict[str, str]
    body: bytes

    def raw(self) -> bytes:
        headers = {"Host": "localhost", **self.headers, "Content-Length": str(len(self.body))}
        lines = [f"POST {self.path} HTTP/1.1", *(": ".join(item) for item in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


class Server(NamedTuple):
    """One that runs, and what it is asked."""

    name: str
    port: int
    post: Post
    process: subprocess.Popen[bytes]


class Load(NamedTuple):
    """What came of a closed loop of requests, all of them answered with 200."""

    answers: int
    rate: float
    p50_ms: float
    p99_ms: float


def main() -> None:
    options = parse()
    bundle = BundleStore(options.store).open(options.model)
    config = bundle.config
    shape = (1, config.num_frames, config.image_size, config.image_size, 3)
    clip = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    runtime = OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False)
    batch = max(options.batches, key=lambda size: bare(runtime, clip, size, options.seconds / 2))
    environment = {
        **os.environ,
        "ENGINE_MODEL": str(bundle.file(ONNX_FLOAT32).absolute()),
        "ENGINE_THREADS": str(usable_cores()),
        "ENGINE_BATCH": str(options.max_batch),
    }
    rounds: list[dict[str, dict[str, float]]] = []
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(started(name, options, clip, environment)) for name in options.peers
        ]
        idle = {server.name: idle_cores(server) for server in servers}
        memory = {server.name: memory_mib(server) for server in servers}
        for _ in range(options.rounds):
            loop = bare(runtime, clip, batch, options.seconds)
            alone_ms = 1e3 / bare(runtime, clip, 1, options.seconds / 4)
            # Of all processes on the machine, ours of the round before included.
            found = {"bare loop": {"rate": loop, "ratio": 1.0, "load": os.getloadavg()[0]}}
            for server in servers:
                found[server.name] = measure(server, options, loop)
                found[server.name]["added_ms"] = found[server.name]["alone_p50_ms"] - alone_ms
            rounds.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
    report(options, batch, rounds, idle, memory)


def parse() -> argparse.Namespace:
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--model", default="toy", help="a bundle of the store")
    recipe = RECIPES.get(named.parse_known_args()[0].model, Recipe())
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=description, parents=[named])
    parser.set_defaults(**recipe._asdict())
    parser.add_argument("--store", type=Path, default=Path("build/peers/store"))
    parser.add_argument("--python", type=Path, default=Path("build/peers/venv/bin/python"))
    parser.add_argument("--peers", nargs="*", choices=PEERS)
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--batches", type=int, nargs="*", help="of the bare loop, to find the best")
    parser.add_argument("--generator", choices=("wrk", "python"))
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def bare(runtime: OnnxRuntime, clip: np.ndarray, size: int, seconds: float) -> float:
    """Clips a second of the engine in a loop."""
    frames = clip.repeat(size, axis=0)
    runtime.run(frames)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        runtime.run(frames)
        done += size
    return done / (time.perf_counter() - start)


@contextlib.contextmanager
def started(
    name: str, options: argparse.Namespace, clip: np.ndarray, environment: dict[str, str]
) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    python = str(options.python.absolute())
    command = {
        "service": [sys.executable, "-c", "from service.__main__ import main; main()", "serve"],
        "litserve": [python, "serve_litserve.py", str(port)],
        "bentoml": [python, "-m", "bentoml", "serve", "serve_bentoml:Peer", "--port", str(port)],
        "ray": [python, "serve_ray.py", str(port)],
    }[name]
    if name == "service":
        command += ["--store", str(options.store), "--model", options.model, "--device", "cpu"]
        command += ["--port", str(port), "--max-batch-clips", str(options.max_batch)]
        command += ["--log-level", "warning", "--decode-workers", "1"]
        post = v2(options.model, clip)
    else:
        post = raw(clip) if name == "ray" else form(clip)
    folder = None if name == "service" else HERE
    log = (options.python.parents[2] / f"{name}.log").open("wb")
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    server = Server(name, port, post, process)
    try:
        wait_for(server)
        asyncio.run(closed_loop(server, options.concurrency, options.seconds / 2))
        yield server
    finally:
        tree = [process.pid, *descendants(process.pid)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)


def wait_for(server: Server) -> None:
    until = time.monotonic() + 180
    while True:
        try:
            asyncio.run(closed_loop(server, 1, 0.01))
            return
        except (OSError, asyncio.IncompleteReadError, RuntimeError) as error:
            if time.monotonic() > until or server.process.poll() is not None:
                raise RuntimeError(f"{server.name} does not answer: {error}") from error
            time.sleep(0.5)


def v2(model: str, clip: np.ndarray) -> Post:
    item = {"name": "frames", "datatype": "UINT8", "shape": clip.shape}
    tensor = {**item, "parameters": {"binary_data_size": clip.nbytes}}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}]
    head = orjson.dumps({"inputs": [tensor], "outputs": outputs})
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return Post(f"/v2/models/{model}/infer", headers, head + clip.tobytes())


def raw(clip: np.ndarray) -> Post:
    return Post("/infer", {"Content-Type": "application/octet-stream"}, clip.tobytes())


def form(clip: np.ndarray) -> Post:
    head = b'--x\r\nContent-Disposition: form-data; name="frames"; filename="a.bin"\r\n'
    body = head + b"Content-Type: application/octet-stream\r\n\r\n" + clip.tobytes()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return Post("/infer", headers, body + b"\r\n--x--\r\n")


def measure(server: Server, options: argparse.Namespace, loop: float) -> dict[str, float]:
    load = python_load if options.generator == "python" else wrk_load
    pids = [server.process.pid, *descendants(server.process.pid)]
    before = cpu_seconds(pids)
    found = load(server, options.concurrency, options.seconds)
    used = cpu_seconds(pids) - before
    alone = load(server, 1, options.seconds / 2)
    return {
        **found._asdict(),
        "ratio": found.rate / loop,
        "cpu_ms": used / found.answers * 1e3,
        "alone_p50_ms": alone.p50_ms,
    }


def wrk_load(server: Server, clients: int, seconds: float) -> Load:
    url = f"http://127.0.0.1:{server.port}{server.post.path}"
    with tempfile.NamedTemporaryFile() as body:
        Path(body.name).write_bytes(server.post.body)
        command = ["wrk", "--threads", "1", "--connections", str(clients), "--duration"]
        command += [
            f"{math.ceil(seconds)}s",
            "--timeout",
            "120s",
            "--script",
            str(HERE / "post.lua"),
            url,
            "--",
        ]
        command += [body.name, *(part for item in server.post.headers.items() for part in item)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(printed.splitlines()[-1])
    if found["failures"]:
        raise RuntimeError(f"{server.name} refused or failed {found['failures']} requests")
    answers, seconds = found["answers"], found["seconds"]
    return Load(answers, answers / seconds, found["p50_ms"], found["p99_ms"])


def python_load(server: Server, clients: int, seconds: float) -> Load:
    latencies, took = asyncio.run(closed_loop(server, clients, seconds))
    p99 = sorted(latencies)[int(0.99 * len(latencies))]
    p50 = statistics.median(latencies)
    return Load(len(latencies), len(latencies) / took, p50 * 1e3, p99 * 1e3)


async def closed_loop(server: Server, clients: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of what was answered, and how long it took."""
    request = server.post.raw()
    begun = time.perf_counter()
    latencies: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while (start := time.perf_counter()) < begun + seconds:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not head.startswith(b"http/1.1 200"):
                raise RuntimeError(f"{server.name} refused: {head.decode()}")
            length = int(head.split(b"\ncontent-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies, time.perf_counter() - begun


def idle_cores(server: Server) -> float:
    """Cores that it uses with nothing to do."""
    pids = [server.process.pid, *descendants(server.process.pid)]
    before, start = cpu_seconds(pids), time.perf_counter()
    time.sleep(3)
    return (cpu_seconds(pids) - before) / (time.perf_counter() - start)


def cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(server: Server) -> float:
    """Proportional set size of all its processes."""
    total = 0
    for pid in [server.process.pid, *descendants(server.process.pid)]:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found += [int(path.parent.name), *descendants(int(path.parent.name))]
    return found


def report(
    options: argparse.Namespace,
    batch: int,
    rounds: list[dict[str, dict[str, float]]],
    idle: dict[str, float],
    memory: dict[str, float],
) -> None:
    def median(name: str, figure: str) -> float:
        return statistics.median(found[name][figure] for found in rounds)

    loop = median("bare loop", "rate")
    print(
        f"{options.model}, {options.concurrency} clients by {options.generator}, {options.rounds} "
        f"rounds, load average {median('bare loop', 'load'):.1f}, versions {versions(options)}; "
        f"bare loop {loop:.1f} clips/s in batches of {batch}"
    )
    print(
        "| server | clips/s | of the bare loop | CPU ms a clip | p50 ms | p99 ms "
        "| p50 of one client ms | of that added ms | idle cores | memory MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.peers:
        figures = [median(name, key) for key in ("rate", "ratio", "cpu_ms", "p50_ms", "p99_ms")]
        rate, ratio, cpu, p50, p99 = figures
        print(
            f"| {name} | {rate:.1f} | {ratio:.2f} | {cpu:.1f} | {p50:.0f} | {p99:.0f} "
            f"| {median(name, 'alone_p50_ms'):.1f} | {median(name, 'added_ms'):.1f} "
            f"| {idle[name]:.2f} | {memory[name]:.0f} |"
        )
    if options.json:
        facts: dict[str, Any] = {"rounds": rounds, "idle_cores": idle, "memory_mib": memory}
        options.json.write_text(json.dumps({**facts, "versions": versions(options)}, indent=2))


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Of the peers that were measured, and of what runs the engine."""
    names = [peer for peer in PEERS[1:] if peer in options.peers]
    found: list[str] = []
    if names:
        code = f"import importlib.metadata as m; print(*(m.version(name) for name in {names}))"
        found = subprocess.run(
            [str(options.python), "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    own = {"onnxruntime": importlib.metadata.version("onnxruntime")}
    return {**dict(zip(names, found, strict=True)), **own, "python": platform.python_version()}


if __name__ == "__main__":
    main()
