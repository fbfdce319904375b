"""New data becomes the served model while requests keep coming, and not one of them fails."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.checkpoints import load_checkpoint, save_safetensors
from tests.e2e.conftest import TIMESFORMER, run_service
from tests.model.conftest import flat, random_model, tiny_config, write_video

CONFIG = tiny_config(num_classes=2, depth=1, num_frames=2, image_size=16, frame_stride=4)
QUICK = {"warm_up": 0.0, "layer_decay": 1.0, "ema": 0.0}


def timesformer(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TIMESFORMER, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, (red, blue) in {"red": (1, 0), "blue": (0, 1)}.items():
        (folder / name).mkdir()
        for index in range(6):
            level = 100 + 25 * index
            paint = flat(level if red else 20, 20, level if blue else 20)
            write_video(folder / name / f"{index}.mp4", frames=8, paint=paint)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Version 1 answers `blue` whatever it sees."""
    model = random_model(CONFIG)
    model.head.bias.data = model.head.bias.data.new_tensor([0.5, -0.5])
    model.head.weight.data *= 0.01
    save_safetensors(model, tmp_path / "w.safetensors", CONFIG, labels=("blue", "red"))
    made = timesformer("export", tmp_path / "w.safetensors", "--name", "colours",
                       "--store", tmp_path / "store")  # fmt: skip
    assert made.returncode == 0, made.stderr
    return tmp_path / "store"


class Requests:
    """Threads that ask without a pause; every answer's status and version is kept, in order."""

    def __init__(self, client: httpx.Client, video: Path) -> None:
        self.answers: list[tuple[int, str]] = []
        self._url, self._content = f"{client.base_url}/v1/classify", video.read_bytes()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with httpx.Client(timeout=3600) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self._url, content=self._content)
                    version = answer.json()["model"]["version"]
                    self.answers.append((answer.status_code, version))
                except Exception as error:  # dropped: counted as what it is
                    self.answers.append((0, repr(error)))
                time.sleep(0.02)

    def until(self, version: str) -> None:
        while not self.answers or self.answers[-1][1] != version:
            time.sleep(0.02)

    def end(self) -> Counter[tuple[int, str]]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return Counter(self.answers)


def refresh(store: Path, videos: Path, folder: Path) -> tuple[int, dict[str, Any]]:
    (folder / "recipe.json").write_text(json.dumps(QUICK))
    done = timesformer(
        "refresh", "--data", videos, "--from", store / "colours", "--hold-out", 0.4, "--recipe",
        folder / "recipe.json", "--epochs", 10, "--batch-size", 2, "--learning-rate", 0.01,
        "--workers", 0, "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_running_service_goes_from_one_version_to_the_next_and_back(
    store: Path, videos: Path, tmp_path: Path
) -> None:
    flags = ("--store", store, "--model", "colours", "--watch-interval-s", 0.2,
             "--decode-workers", 1, "--log-format", "text")  # fmt: skip
    with run_service(*map(str, flags)) as service:
        requests = Requests(service.client, videos / "red" / "3.mp4")
        try:
            requests.until("1")
            code, made = refresh(store, videos, tmp_path)
            assert (code, made["version"], made["activated"]) == (0, "2", True), made["reason"]
            requests.until("2")
            content = (videos / "red" / "3.mp4").read_bytes()
            answer = service.client.post("/v1/classify", content=content).json()
            assert answer["predictions"][0]["label"] == "red"

            assert timesformer("bundles", "rollback", "colours", "--store", store).returncode == 0
            requests.until("1")
        finally:
            counted = requests.end()
    assert counted.keys() == {(200, "1"), (200, "2")}, counted
    kept = json.loads((store / "colours" / "2" / "manifest.json").read_text())["training"]
    assert kept["refresh"]["comparison"]["all_classes"]["active"]["top1"] < 1.0
    assert load_checkpoint(store / "colours" / "2" / "weights.safetensors").config == CONFIG
