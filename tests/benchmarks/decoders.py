"""What decoders cost: `python -m tests.benchmarks.decoders [--decoders 2] [--restarts 20]`.

Prints the time until all decoders are ready, the time to replace one, and the CPU time and memory
of each process, in JSON. Needs no model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from pathlib import Path

from model.video import Limits
from service import __main__ as command
from service.decoding.messages import DecoderLimits
from service.decoding.pool import DecoderPool


def cost_of(pid: int) -> dict[str, float]:
    """CPU seconds, and MiB: shared pages by share (PSS), and those of this process alone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    memory = {key: int(kib) / 1024 for key, kib in re.findall(r"^(\w+): +(\d+) kB", rollup, re.M)}
    return {
        "cpu_s": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "pss_mib": round(memory["Pss"], 1),
        "private_mib": round(memory["Private_Dirty"], 1),
    }


async def main(decoders: int, restarts: int) -> None:
    pool = DecoderPool(decoders, DecoderLimits(2 << 30, 60.0, Limits()), lambda reason: None)
    started = time.perf_counter()
    await pool.start()
    ready_s = time.perf_counter() - started
    children = multiprocessing.active_children()
    report: dict[str, object] = {
        "ready_s": round(ready_s, 3),
        "decoders": [cost_of(child.pid or 0) for child in children],
    }
    if restarts:
        seconds = []
        for _ in range(restarts):
            started = time.perf_counter()
            await asyncio.to_thread(pool._decoders[0].restart)
            seconds.append(time.perf_counter() - started)
        report["restart_s"] = {
            "median": round(statistics.median(seconds), 3),
            "slowest": round(max(seconds), 3),
        }
    pool.close()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    # As the command has it, so that decoders do not import this module.
    sys.modules["__main__"].__spec__ = command.__spec__
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=20)
    asyncio.run(main(**vars(parser.parse_args())))
