"""Labels an archive on a local Ray cluster of three nodes, kills one in the middle, and compares.

    make test-ray      or      build/ray/bin/python -m tests.ray.check [--videos 240]

Prints figures. Fails if a video is missing, twice in the table, or labelled otherwise than on one
machine; if a video that kills its decoder costs more than itself; or if the app behind Ray Serve
does not answer as `timesformer serve` does. Nodes are processes here: what is shown is that the
work survives, not that it is faster.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
from ray import serve
from ray.cluster_utils import Cluster as LocalCluster

from model.demo import SAMPLE_CLIP
from service.inference.parameters import ClassifyParameters
from service.offline.archive import Output, label_archive
from service.offline.ray_runner import Cluster, label_on_ray
from service.offline.videos import find_videos
from service.settings import load_settings
from tests.processes import free_port
from tests.videos import encode

TIMESFORMER = Path(sys.executable).with_name("timesformer")
NODE = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False}
BLOCK = 8
TOLERANCE = 2e-6  # scores are rounded to six digits, and batches are composed otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=240)
    parser.add_argument("--only-serve", action="store_true", help="leave the labelling out")
    options = parser.parse_args()
    if options.only_serve:
        check_serve()
        return
    with tempfile.TemporaryDirectory(prefix="timesformer-ray-") as folder:
        work = Path(folder)
        archive = work / "archive"
        write_archive(archive, options.videos)
        local = by_command(archive, work / "local.parquet")
        print(f"local: {said(local)}", flush=True)
        cluster = LocalCluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 1})
        try:
            for _ in range(2):
                cluster.add_node(**NODE)
            cluster.wait_for_nodes()
            few = work / "few.txt"
            few.write_text("\n".join(str(path) for path in sorted(archive.iterdir())[:20]))
            by_ray = by_command(
                few, work / "few.parquet", "--engine", "ray", "--ray-address", cluster.address
            )
            print(f"ray, by command, 20 videos: {said(by_ray)}", flush=True)
            compare(work / "few.parquet", work / "local.parquet", 20)
            check_a_killed_node(cluster, archive, work)
            check_serve()
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


def write_archive(folder: Path, videos: int) -> None:
    """Squares that move in many ways, of several sizes, and three files that are no videos."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(videos):
        width, height = (int(size) * 2 for size in rng.integers(48, 160, 2))
        start, speed = rng.uniform(0.1, 0.9, 2), rng.uniform(-0.01, 0.01, 2)
        pictures = np.full((60, height, width, 3), number % 200, np.uint8)
        for index, picture in enumerate(pictures):
            x, y = ((start + index * speed) % 1 * (width - 24, height - 24)).astype(int)
            picture[y : y + 24, x : x + 24] = 255 - number % 200
        encode(folder / f"{number:04}.mp4", pictures, preset="ultrafast")
    (folder / "empty.mp4").touch()
    (folder / "words.mp4").write_bytes(b"no video at all, only words")
    (folder / "folder.mp4").mkdir()


def by_command(source: Path, out: Path, *words: str) -> dict[str, float]:
    command = [TIMESFORMER, "label", source, "--out", out, "--device", "cpu", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{done.stdout}{done.stderr}")
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def said(facts: Mapping[str, float]) -> str:
    return (
        f"{facts['labelled']} videos in {facts['seconds']:.1f} s, "
        f"{facts['videos'] / facts['seconds']:.1f} videos/s, {facts['failed']} failed"
    )


def check_a_killed_node(cluster: LocalCluster, archive: Path, work: Path) -> None:
    """The driver is this process, on the head; another node is killed once a tenth is done."""
    out = work / "ray.parquet"
    videos = find_videos(str(archive))
    ray.init(address=cluster.address, logging_level="warning")
    killed: list[int] = []

    def kill() -> None:
        parts = out.with_name(f"{out.name}.parts")
        while len(list(parts.glob("[0-9]*.parquet"))) * BLOCK < len(videos) / 10:
            time.sleep(0.05)
        done = len(list(parts.glob("[0-9]*.parquet"))) * BLOCK
        victim = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        cluster.remove_node(victim, allow_graceful=False)
        killed.append(done)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    summary = label_archive(
        videos,
        Output(out, BLOCK, again=False),
        load_settings(device="cpu"),
        ClassifyParameters.model_validate({}),
        functools.partial(label_on_ray, cluster=Cluster(cluster.address, engines=2, decoders=3)),
        quiet=True,
    )
    killer.join(10)
    assert killed, "the run was over before a node was killed: take more --videos"
    assert killed[0] < len(videos), killed
    alive = sum(node["Alive"] for node in ray.nodes())
    facts = {**summary._asdict()}
    print(f"ray, a node of three killed after {killed[0]}: {said(facts)}; {alive} nodes left")
    compare(out, work / "local.parquet", len(videos))


def compare(ours: Path, theirs: Path, videos: int) -> None:
    """The rows of `ours` are those of `theirs`, but for the last digit of a score."""
    rows = pq.read_table(ours).to_pylist()
    expected = {row["path"]: row for row in pq.read_table(theirs).to_pylist()}
    assert len(rows) == len({row["path"] for row in rows}) == videos, len(rows)
    largest = 0.0
    for row in rows:
        wanted = expected[row["path"]]
        for name in row.keys() - {"score", "scores", "labels", "class_indices"}:
            assert row[name] == wanted[name], (row["path"], name)
        if row["scores"] is None:
            continue
        ours_by, theirs_by = (
            dict(zip(item["labels"], item["scores"], strict=True)) for item in (row, wanted)
        )
        assert ours_by.keys() == theirs_by.keys(), row["path"]
        largest = max(largest, *(abs(ours_by[name] - theirs_by[name]) for name in ours_by))
    assert largest <= TOLERANCE, largest
    print(f"  {videos} rows, as on one machine; largest difference of a score {largest:.1e}")


def check_serve() -> None:
    """The app behind Ray Serve labels the bundled clip, reports its metrics and refuses words."""
    from service.server.ray_serve import app

    os.environ["TIMESFORMER_DEVICE"] = "cpu"  # replicas start with our environment
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    started = time.monotonic()
    serve.run(app, name="timesformer", route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    answer = json.loads(request(f"{url}/v1/classify", SAMPLE_CLIP.read_bytes()))
    assert answer["predictions"][0]["label"] == "turning clockwise", answer
    refused = json.loads(request(f"{url}/v1/classify", b"no video at all, only words"))
    assert refused["code"] in {"undecodable_video", "unsupported_format"}, refused
    assert json.loads(request(f"{url}/health/ready"))["ready"]
    assert b"timesformer_requests_total" in request(f"{url}/metrics")
    best = answer["predictions"][0]
    print(f"Ray Serve, {time.monotonic() - started:.1f} s: {best['label']}, {best['score']}")


def request(url: str, body: bytes | None = None) -> bytes:
    """The answer to a GET or POST, also if it is an error."""
    try:
        with urllib.request.urlopen(url, body, timeout=60) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        return error.read()


if __name__ == "__main__":
    main()
