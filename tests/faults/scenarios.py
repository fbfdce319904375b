"""What an operator fears, done on purpose to a service under load; prints what clients saw.

    python -m tests.faults.scenarios [--seconds 10] [--clients 6] [--only disk_full ...]

decoder_killed      decoders die by SIGKILL, one a second
server_killed       the server dies by SIGKILL with jobs waiting, and is started again
disk_full           the spool is a file system of 2 MB (needs the right to mount; else left out)
pointer_corrupt     the store's pointer to the active version is overwritten with noise
bundle_broken       a version with a damaged graph is made the active one
swaps               two versions take over from each other fifty times

Every answer with 200 must be that of the version that it names, to the digit. Exits with 1 if one
is not, or anything came back that a client should not see.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from export.bundle.bundle import BundleStore
from model.demo import SAMPLE_CLIP, STORE
from tests.e2e.conftest import Service, run_service
from tests.processes import children_of, descendants_of

# The versions of the store: one network, but so that their scores differ.
TEMPERATURES = {"1": None, "2": 2.0, "3": 3.0}
LOST = "connection lost"
_JOBS = 20


class Answers:
    """What came back, by status and code, and which 200s were wrong."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.versions: collections.Counter[str] = collections.Counter()
        self.scores: dict[str, set[float]] = collections.defaultdict(set)
        self.slowest_s = 0.0
        self._lock = threading.Lock()

    def take(self, seconds: float, response: httpx.Response | None) -> None:
        with self._lock:
            self.slowest_s = max(self.slowest_s, seconds)
            if response is None:
                self.outcomes[LOST] += 1
                return
            body = response.json()
            code = body.get("code", "")
            self.outcomes[f"{response.status_code} {code}".strip()] += 1
            if response.status_code == 200:
                version = body["model"]["version"]
                self.versions[version] += 1
                self.scores[version].add(body["predictions"][0]["score"])


class Scenario(NamedTuple):
    """What is done to the service, and what clients see of it beside 200."""

    run: Callable[[Service, Path, argparse.Namespace], str]
    may_see: frozenset[str] = frozenset()
    must_see: frozenset[str] = frozenset()
    """Else what was to be done was not."""


def main() -> None:
    """Runs the scenarios one after the other."""
    options = parse()
    failed = []
    for name in options.only or SCENARIOS:
        scenario = SCENARIOS[name]
        try:
            answers, note = play(scenario, options)
        except PermissionError as error:
            print(f"{name:16} left out: {error}")
            continue
        unseen = set(answers.outcomes) - scenario.may_see - scenario.must_see - {"200"}
        unhurt = scenario.must_see - set(answers.outcomes)
        wrong = {version for version, scores in answers.scores.items() if len(scores) > 1}
        same = len(set.union(*answers.scores.values())) != len(answers.scores)
        outcomes = ", ".join(f"{count} x {what}" for what, count in answers.outcomes.items())
        print(f"{name:16} {outcomes}; slowest {answers.slowest_s:.2f} s; {note}")
        if unseen or unhurt or wrong or same or not answers.outcomes["200"]:
            failed.append(name)
            print(
                f"{'':16} FAILED: not to be seen {unseen or 'none'}, missing {unhurt or 'none'}, "
                f"mixed answers of versions {wrong or 'none'}"
            )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, metavar="SCENARIO")
    return parser.parse_args()


def play(scenario: Scenario, options: argparse.Namespace) -> tuple[Answers, str]:
    """One scenario on a fresh store and a fresh service; it is well again at the end."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_store(folder / "store")
        spool = folder / "spool"
        spool.mkdir()
        (folder / "jobs").mkdir()
        if scenario.run is disk_full:
            stack.enter_context(small_disk(spool))
        flags = [f"--{name}-dir={folder / name}" for name in ("spool", "jobs")]
        flags += [f"--store={folder / 'store'}"]
        answers, stop = Answers(), threading.Event()
        service = stack.enter_context(
            run_service(*flags, "--watch-interval-s=0.1", "--log-level=error")
        )
        with load(service, answers, stop, options.clients):
            note = scenario.run(service, folder, options)
        if service.process.poll() is None:
            well = service.client.post("/v1/classify", content=SAMPLE_CLIP.read_bytes())
            answers.take(0, well)
            assert well.status_code == 200, well.text
    return answers, note


def make_store(store: Path) -> None:
    """Versions of the demo model that differ in their scores alone; the first is active."""
    shutil.copytree(STORE, store)
    for version, temperature in TEMPERATURES.items():
        folder = store / "demo" / version
        if temperature is not None:
            shutil.copytree(store / "demo" / "1", folder)
            path = folder / "manifest.json"
            manifest = json.loads(path.read_text())
            path.write_text(
                json.dumps({**manifest, "version": version, "temperature": temperature})
            )


@contextlib.contextmanager
def load(service: Service, answers: Answers, stop: threading.Event, clients: int) -> Iterator[None]:
    """Clients that ask again and again, for as long as the block runs."""
    clip = SAMPLE_CLIP.read_bytes()

    def ask() -> None:
        with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
            while not stop.is_set():
                began = time.monotonic()
                response = None
                with contextlib.suppress(httpx.TransportError):
                    response = client.post("/v1/classify", content=clip)
                answers.take(time.monotonic() - began, response)
                if response is None or response.status_code != 200:
                    time.sleep(0.05)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def decoder_killed(service: Service, folder: Path, options: argparse.Namespace) -> str:
    killed = 0
    ends = time.monotonic() + options.seconds
    while time.monotonic() < ends:
        children = children_of(service.process.pid)
        decoders = descendants_of(service.process.pid) - children  # of the fork server
        for pid in children:  # and, after a crash, spawned
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    decoders.add(pid)
        if decoders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sorted(decoders)[killed % len(decoders)], signal.SIGKILL)
                killed += 1
        time.sleep(1)
    return f"{killed} decoders killed"


def server_killed(service: Service, folder: Path, options: argparse.Namespace) -> str:
    time.sleep(options.seconds / 3)
    port = service.client.base_url.port
    clip = SAMPLE_CLIP.read_bytes()
    accepted = {
        service.client.post("/v1/jobs", params={"kind": "classify"}, content=clip).json()["id"]
        for _ in range(_JOBS)
    }
    service.process.kill()
    service.process.wait()
    began = time.monotonic()
    flags = [f"--{name}-dir={folder / name}" for name in ("spool", "jobs")]
    flags += [f"--store={folder / 'store'}", f"--port={port}", "--log-level=error"]
    with run_service(*flags) as again:
        took = time.monotonic() - began
        time.sleep(options.seconds / 3)
        spools = len(list((folder / "spool").iterdir()))
        states = wait_for_jobs(again)
    assert spools == 1, f"{spools} spools: that of the killed server was not cleared"
    assert states == dict.fromkeys(accepted, "done"), f"jobs were lost or failed: {states}"
    return f"ready again {took:.1f} s after the kill, the spool cleared, {_JOBS} jobs done"


def wait_for_jobs(service: Service) -> dict[str, str]:
    """The states of all jobs, once none waits or runs."""
    deadline = time.monotonic() + 120
    while True:
        jobs = service.client.get("/v1/jobs", params={"limit": 100}).json()["jobs"]
        states = {job["id"]: job["state"] for job in jobs}
        if not {"queued", "running"} & set(states.values()) or time.monotonic() > deadline:
            return states
        time.sleep(0.1)


def disk_full(service: Service, folder: Path, options: argparse.Namespace) -> str:
    time.sleep(options.seconds / 3)
    filler = folder / "spool" / "filler"
    ends = time.monotonic() + options.seconds / 3
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < ends:
            try:
                file.write(bytes(4096))
            except OSError:  # full, until an upload that was there already goes
                time.sleep(0.001)
    filler.unlink()
    time.sleep(options.seconds / 3)
    return "filled for a third of the time"


@contextlib.contextmanager
def small_disk(spool: Path) -> Iterator[None]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(spool)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(spool)], check=True)


def pointer_corrupt(service: Service, folder: Path, options: argparse.Namespace) -> str:
    store = BundleStore(folder / "store")
    store.activate("demo", "2")
    time.sleep(options.seconds / 3)
    pointer = folder / "store" / "demo" / "active.json"
    assert pointer.is_file()
    whole = pointer.read_bytes()
    pointer.write_bytes(os.urandom(len(whole)))
    time.sleep(options.seconds / 3)
    told = metric(service, "timesformer_active_bundle_refused")
    pointer.write_bytes(whole)
    time.sleep(options.seconds / 3)
    return f"the metric said so: {told}; afterwards: " + metric(
        service, "timesformer_active_bundle_refused"
    )


def bundle_broken(service: Service, folder: Path, options: argparse.Namespace) -> str:
    graph = folder / "store" / "demo" / "3" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    pointer = folder / "store" / "demo" / "active.json"
    BundleStore(folder / "store").activate("demo", "2")
    time.sleep(options.seconds / 2)
    # Past the store's own check, as a disk that loses bits after the activation would be.
    pointer.write_text(pointer.read_text().replace('"2"', '"3"', 1))
    time.sleep(options.seconds / 2)
    return "refused by metric: " + metric(service, "timesformer_active_bundle_refused")


def swaps(service: Service, folder: Path, options: argparse.Namespace) -> str:
    store = BundleStore(folder / "store")
    began = time.monotonic()
    for turn in range(50):
        version = "2" if turn % 2 == 0 else "1"
        store.activate("demo", version)
        while service.client.get("/health/ready").json()["model"]["version"] != version:
            time.sleep(0.02)
    return f"50 swaps in {time.monotonic() - began:.1f} s"


def metric(service: Service, name: str) -> str:
    lines = service.client.get("/metrics").text.splitlines()
    return "; ".join(line for line in lines if line.startswith(name))


SCENARIOS = {
    "decoder_killed": Scenario(
        decoder_killed, frozenset({"422 decoder_crashed", "503 decoder_unavailable"})
    ),
    "server_killed": Scenario(server_killed, must_see=frozenset({LOST})),
    "disk_full": Scenario(disk_full, must_see=frozenset({"503 spool_full"})),
    "pointer_corrupt": Scenario(pointer_corrupt),
    "bundle_broken": Scenario(bundle_broken),
    "swaps": Scenario(swaps),
}

if __name__ == "__main__":
    main()
