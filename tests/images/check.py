"""Builds the images for real, runs them hardened, and prints what they weigh and how they did.

    make test-images BUILD="docker build" ENGINE=docker
    make test-images BUILD="buildah build --layers --build-arg BASE_IMAGE=..." ENGINE=podman

`serve-cpu` names the motion in a video, cannot write to its root, is not root, has no torch and
ends with 0 on SIGTERM. `train` renders a small set and refreshes the bundle that `serve-cpu` serves
meanwhile, which takes the new version over. Needs no network but that of the build.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from model.demo import SAMPLE_CLIP, STORE

ROOT = Path(__file__).parents[2]
HARDENED = [
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--pids-limit", "512", "--tmpfs", "/tmp:size=256m"),  # noqa: S108
]


def output(*words: str | Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def build(command: list[str], engine: str, stage: str) -> str:
    """Builds a stage of the Dockerfile; returns its tag."""
    tag = f"localhost/timesformer-check:{stage}"
    started = time.monotonic()
    subprocess.run(
        [*command, "--target", stage, "--tag", tag, "."],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    size = int(output(engine, "image", "inspect", tag, "--format", "{{.Size}}"))
    print(f"{stage}: built in {time.monotonic() - started:.0f} s, {size / 1e6:.0f} MB", flush=True)
    labels = json.loads(output(engine, "image", "inspect", tag))[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"], labels
    return tag


@contextlib.contextmanager
def serving(engine: str, tag: str, store: Path, port: int) -> Iterator[tuple[str, httpx.Client]]:
    """A hardened service that is ready, as container id and client."""
    started = time.monotonic()
    container = output(
        *(engine, "run", "--detach", *HARDENED, "--memory", "2g"),
        *("--publish", f"127.0.0.1:{port}:8000", "--volume", f"{store}:/bundles:ro"),
        *("--env", "TIMESFORMER_STORE=/bundles", tag),
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health/ready").status_code == 200:
                        break
                if time.monotonic() - started > 60:
                    raise SystemExit("not ready:\n" + output(engine, "logs", container))
                time.sleep(0.2)
            print(f"serve-cpu: ready after {time.monotonic() - started:.1f} s", flush=True)
            yield container, client
    finally:
        subprocess.run([engine, "rm", "--force", container], capture_output=True, check=False)


def check_service(engine: str, container: str, client: httpx.Client) -> None:
    """It works, and can do no more than it should."""
    answer = client.post("/v1/classify", content=SAMPLE_CLIP.read_bytes()).json()
    best = answer["predictions"][0]
    assert best["label"] == "turning clockwise", answer
    print(f"serve-cpu: {best['label']}, {best['score']:.3f}")
    assert output(engine, "exec", container, "id", "-u") == "10001"
    for command in ("touch /written", "touch /opt/timesformer/written"):
        words = [engine, "exec", container, *command.split()]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode != 0, command
        assert "Read-only" in done.stderr, done.stderr
    status = output(engine, "exec", container, "cat", "/proc/1/status")
    rights = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(rights["CapEff"], 16) == int(rights["CapBnd"], 16) == 0
    assert rights["NoNewPrivs"] == "1"
    torch = [engine, "exec", container, "python3", "-c", "import torch"]
    assert subprocess.run(torch, capture_output=True, check=False).returncode == 1
    print("serve-cpu: user 10001, root read-only, no capabilities, no torch")
    metrics = client.get("/metrics").text
    for layer in ("landlock", "seccomp"):
        assert f'timesformer_decode_sandbox{{layer="{layer}"}} 1.0' in metrics, layer
    print("serve-cpu: decoders in Landlock and seccomp")


def check_refresh(engine: str, tag: str, store: Path, data: Path, client: httpx.Client) -> None:
    """`train` makes a version, and the service that runs takes it over."""
    run = [engine, "run", "--rm", *HARDENED, "--memory", "6g", "--shm-size", "512m"]
    mounts = ["--volume", f"{store}:/bundles", "--volume", f"{data}:/data"]
    run += [*mounts, "--env", "TIMESFORMER_STORE=/bundles", tag]
    output(*run, "data", "demo", "/data", "--videos", "48", "--held-out", "24")
    refresh(run, client)


def refresh(run: list[str], client: httpx.Client) -> None:
    """Runs `train` on the demo set at /data; the service that runs takes the new version over."""
    before = client.get("/health/ready").json()["model"]["version"]
    started = time.monotonic()
    rule = ["--rule", "not-worse", "--min-gain", "-1", "--max-old-drop", "1"]
    lists = ["--data", "/data/train.csv", "--validation", "/data/validation.csv"]
    output(*run, "refresh", *lists, *rule, "--epochs", "1", "--json")
    print(f"train: refreshed in {time.monotonic() - started:.0f} s", flush=True)
    after = wait_for(
        lambda: (
            version
            if (version := client.get("/health/ready").json()["model"]["version"]) != before
            else None
        ),
        "the service did not take the new version over",
        60,
    )
    print(f"serve-cpu: serves version {after} instead of {before}", flush=True)


def wait_for(found: Callable[[], Any], what: str, seconds: float) -> Any:
    """What `found` returns, as soon as it is something."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        if time.monotonic() > deadline:
            raise SystemExit(what)
        time.sleep(0.5)
    return result


def open_to_all(folder: Path) -> None:
    """The images' user is not this one."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)


def check_stop(engine: str, container: str) -> None:
    """SIGTERM ends it, in time and with 0."""
    started = time.monotonic()
    output(engine, "stop", "--time", "40", container)
    code = output(engine, "inspect", container, "--format", "{{.State.ExitCode}}")
    assert code == "0", code
    print(f"serve-cpu: SIGTERM to exit 0 in {time.monotonic() - started:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build and check the images.")
    parser.add_argument("--build", default="docker build", help="What builds, with its options.")
    parser.add_argument("--engine", default="docker", help="What runs: docker or podman.")
    parser.add_argument("--port", type=int, default=18000)
    options = parser.parse_args()
    command, engine = shlex.split(options.build), options.engine
    serve, train = (build(command, engine, stage) for stage in ("serve-cpu", "train"))
    with tempfile.TemporaryDirectory() as name:
        store, data = Path(name, "bundles"), Path(name, "data")
        shutil.copytree(STORE, store)
        data.mkdir()
        open_to_all(Path(name))
        with serving(engine, serve, store, options.port) as (container, client):
            check_service(engine, container, client)
            check_refresh(engine, train, store, data, client)
            check_stop(engine, container)


if __name__ == "__main__":
    main()
