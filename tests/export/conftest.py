"""Bundles to test with: one exported for real, and one made by hand that tells colours."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.bundle.bundle import Bundle, BundleStore
from export.bundle.manifest import (
    LABELS,
    ONNX_FLOAT32,
    WEIGHTS,
    FileEntry,
    Manifest,
    Parity,
    TensorSpec,
)
from export.pipeline import export_bundle
from export.runtime.plans import PlanFacts, PlanKey
from model.checkpoints import Checkpoint, load_checkpoint, save_safetensors
from model.config import ATTENTION_TYPES, ModelConfig
from tests.conftest import MakeOnce
from tests.model.conftest import random_model, tiny_config
from tests.videos import encode

# `make test` sees the published scheme and the simplest; CI sees all.
EVERY_SCHEME = [
    scheme
    if scheme in ("divided_space_time", "space_only")
    else pytest.param(scheme, marks=pytest.mark.slow)
    for scheme in ATTENTION_TYPES
]
COLOURS = ("red", "green", "blue")
PASSED = Parity(
    clips=2,
    max_difference=0.0,
    mean_difference=0.0,
    embedding_max_difference=0.0,
    top1_agreement=1.0,
    limit=1e-4,
    passed=True,
)


def write_video(path: Path, colour: str = "red", frames: int = 40) -> Path:
    """A 48 x 32 video that is all of one colour, 30 fps."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[..., COLOURS.index(colour)] = 220
    return encode(path, [picture] * frames, codec="mpeg4")


def colour_config() -> ModelConfig:
    return tiny_config(num_classes=3, embed_dim=16, image_size=16)


def write_colour_graph(path: Path, divisor: float = 64) -> None:
    """A graph whose logits are the mean of the clip's red, green and blue, divided by `divisor`."""
    frames = helper.make_tensor_value_info("frames", TensorProto.UINT8, ["batch", 4, 16, 16, 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("logits", 3), ("embedding", 16))
    ]
    constants = {
        "axes": np.array([1, 2, 3], np.int64),
        "divisor": np.array(divisor, np.float32),
        "spread": np.ones((3, 16), np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["frames"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "divisor"], ["logits"]),
        helper.make_node("MatMul", ["logits", "spread"], ["embedding"]),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "colours", [frames], outputs, initializers)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def colour_manifest(name: str = "colours") -> Manifest:
    config = colour_config()
    architecture, preprocessing = config.to_dict(), dataclasses.asdict(config.preprocessing)
    return Manifest(
        name=name,
        version="0",
        created=datetime.now(UTC),
        source="made by hand",
        architecture={key: architecture[key] for key in architecture.keys() - preprocessing.keys()},
        preprocessing=preprocessing,
        labels=COLOURS,
        inputs=(TensorSpec(name="frames", dtype="uint8", shape=(-1, 4, 16, 16, 3)),),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=(-1, 3)),
            TensorSpec(name="embedding", dtype="float32", shape=(-1, 16)),
        ),
        weights_sha256="0" * 64,
        files={},
        software={},
        verification={ONNX_FLOAT32: PASSED},
    )


def publish_colours(
    store: BundleStore, name: str = "colours", divisor: float = 64, **changes: object
) -> Bundle:
    """Publishes the hand-made bundle; `changes` are of its manifest."""
    with store.staging(name) as staging:
        write_colour_graph(staging / ONNX_FLOAT32, divisor)
        (staging / LABELS).write_text("\n".join(COLOURS) + "\n")
        (staging / WEIGHTS).write_bytes(b"none")
        return store.publish(staging, colour_manifest(name).model_copy(update=changes))


def plan_facts(key: PlanKey, graph_sha256: str, content: bytes = b"a plan") -> PlanFacts:
    """Facts of a plan that no TensorRT has built."""
    return PlanFacts(
        key=key,
        graph_sha256=graph_sha256,
        plan=FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content)),
        created=datetime.now(UTC),
        seconds=1,
        refittable=False,
        level=3,
        structure="",
        network={},
    )


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "store")


@pytest.fixture(scope="session")
def video(make_once: MakeOnce) -> Path:
    return make_once("red", lambda folder: write_video(folder / "red.mp4")) / "red.mp4"


def write_checkpoint(path: Path) -> None:
    """Writes our own file of a tiny model with random weights, and with labels."""
    config = tiny_config()
    labels = [f"action {index}" for index in range(config.num_classes)]
    save_safetensors(random_model(config), path, config, labels=labels)


@pytest.fixture(scope="session")
def checkpoint(make_once: MakeOnce) -> Checkpoint:
    name = "weights.safetensors"
    folder = make_once("checkpoint", lambda folder: write_checkpoint(folder / name))
    return load_checkpoint(folder / name)


@pytest.fixture(scope="session")
def exported(checkpoint: Checkpoint, video: Path, make_once: MakeOnce) -> Bundle:
    """The checkpoint's bundle, exported once for all tests: do not change its files."""

    def fill(folder: Path) -> None:
        store = BundleStore(folder)
        export_bundle(checkpoint, "tiny", store, videos=[video], training={"top1": 0.5})

    return BundleStore(make_once("exported", fill)).open("tiny", "1")


@pytest.fixture(scope="session")
def whole(checkpoint: Checkpoint, video: Path, make_once: MakeOnce) -> Bundle:
    """The bundle of all precisions, made once for all tests: do not change its files."""

    def fill(folder: Path) -> None:
        export_bundle(checkpoint, "tiny", BundleStore(folder), videos=[video], precisions=["auto"])

    return BundleStore(make_once("whole", fill)).open("tiny", "1")


@pytest.fixture
def quick_export(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the checkpoint's graph is copied, not made again: seconds less a test."""
    graph = exported.file(ONNX_FLOAT32)
    monkeypatch.setattr("export.pipeline.export_onnx", lambda model, path: shutil.copy(graph, path))


class VirtualClock:
    """Time for `export.benchmark.timing`, which passes only as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        now = SimpleNamespace(perf_counter=self.read, process_time=self.read)
        monkeypatch.setattr("export.benchmark.timing.time", now)

    def read(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


@contextlib.contextmanager
def _full_disk(after: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Inside the block the kernel refuses to write files beyond so many bytes."""
    return _full_disk


@pytest.fixture(scope="session", autouse=True)
def one_thread(one_export_of_each_network: None) -> None:
    """Networks this small take longer on several."""
    torch.set_num_threads(1)
