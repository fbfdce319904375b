"""Damaged videos by the thousand against a running service: no 5xx, no hang, no leak, no leftover.

    python -m tests.faults.fuzz VIDEO_FOLDER [--count 10000] [--seed 0] [--clients 4]
        [--path /v1/timeline]

Each request is a real file with bytes flipped, cut out, overwritten or spliced from another file.
Prints what came back by status and code, and the server's memory at a tenth, half and the end;
exits with 1 if anything but an answer, a 4xx, 503 or 504 came back, the memory grew by more than a
twentieth from the tenth to the end, or something stayed behind.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import orjson

from tests.e2e.conftest import Service, run_service
from tests.processes import descendants_of, resident_bytes, stat

_MOST_GROWTH = 0.05
_REFUSALS = (503, 504)  # in order, with Retry-After: there are more at once than are let in


def main() -> None:
    """Runs the load and prints the table."""
    options = parse()
    files = [path.read_bytes() for path in sorted(options.folder.iterdir()) if path.is_file()]
    with (
        tempfile.TemporaryDirectory() as spool,
        run_service("--spool-dir", spool, "--log-level", "warning") as service,
    ):
        outcomes, memory = load(service, files, options)
        left = list(Path(spool).glob("*/*"))
        zombies = [pid for pid in descendants_of(service.process.pid) if stat(pid)[:1] == ["Z"]]
        restarts = [
            line
            for line in service.client.get("/metrics").text.splitlines()
            if line.startswith("timesformer_decoder_restarts_total")
        ]
    for (status, code), count in sorted(outcomes.items()):
        print(f"{status} {code:24} {count}")
    print("server memory, MiB:", ", ".join(f"{size / 2**20:.0f}" for size in memory))
    print("decoder restarts:", "; ".join(restarts) or "none")
    bad = [(status, code) for status, code in outcomes if status >= 500 and status not in _REFUSALS]
    grew = memory[-1] / memory[0] - 1
    if bad or left or zombies or grew > _MOST_GROWTH:
        sys.exit(f"failed: {bad}, left in the spool {left}, zombies {zombies}, grew {grew:.1%}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--path", choices=["/v1/classify", "/v1/timeline"], default="/v1/classify")
    return parser.parse_args()


def load(
    service: Service, files: list[bytes], options: argparse.Namespace
) -> tuple[collections.Counter[tuple[int, str]], list[int]]:
    """Posts them all; returns how often each outcome came, and the memory on the way."""
    outcomes: collections.Counter[tuple[int, str]] = collections.Counter()
    milestones = {options.count // 10, options.count // 2, options.count}
    memory = []

    def post(number: int) -> tuple[int, str]:
        rng = np.random.default_rng([options.seed, number])
        body = mutate(files, rng)
        started = time.monotonic()
        try:
            response = service.client.post(options.path, content=body)
        except httpx.HTTPError as error:
            return 599, f"{type(error).__name__} after {time.monotonic() - started:.0f} s"
        return outcome_of(response)

    with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
        for number, outcome in enumerate(pool.map(post, range(options.count)), start=1):
            outcomes[outcome] += 1
            if number in milestones:
                memory.append(resident_bytes(service.process.pid))
    return outcomes, memory


def outcome_of(response: httpx.Response) -> tuple[int, str]:
    """Status and code; of a stream of events those that its last event has."""
    if response.status_code != 200:
        return response.status_code, response.json()["code"]
    last = orjson.loads(response.content.splitlines()[-1])
    match last.get("event"):
        case None | "summary":
            return 200, "truncated" if last["video"]["truncated"] else "whole"
        case "error":
            return last["status"], last["code"]
        case other:
            return 599, f"ends with {other}"


def mutate(files: list[bytes], rng: np.random.Generator) -> bytes:
    """One to three injuries of a random file."""
    data = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.integers(1, 4)):
        if not data:
            break
        start = int(rng.integers(len(data)))
        length = int(min(len(data) - start, 2 ** rng.integers(0, 14)))
        match rng.integers(5):
            case 0:  # flip bits here and there; headers more often than chance has it
                scope = min(len(data), int(2 ** rng.integers(6, 22)))
                for place in rng.integers(0, scope, rng.integers(1, 50)):
                    data[place] ^= 1 << int(rng.integers(8))
            case 1:
                del data[start:]
            case 2:
                del data[start : start + length]
            case 3:
                data[start : start + length] = rng.bytes(length)
            case _:
                other = files[rng.integers(len(files))]
                cut = int(rng.integers(len(other) + 1))
                data[start : start + length] = other[cut : cut + length]
    return bytes(data)


if __name__ == "__main__":
    main()
