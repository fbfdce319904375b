"""The fastest precision on a GPU: what is measured, what is left out, and that `auto` takes it. The
GPU is made up: plans are the bundle's graphs in ONNX Runtime, some of them slow or wrong.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.bundle.bundle import Bundle, BundleStore
from export.bundle.manifest import LABELS, ONNX_FLOAT32, ONNX_FP8, ONNX_FP16, WEIGHTS
from export.runtime.cuda import CudaError
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import Gpu, PlanError, engines_folder, locked
from export.runtime.tensorrt import TensorRt
from export.tensorrt.precision_benchmark import measure_fastest
from tests.export.conftest import COLOURS, PASSED, VirtualClock, colour_manifest, write_colour_graph

BATCHES = (1, 4)
GRAPHS = {"float32": ONNX_FLOAT32, "fp16": ONNX_FP16, "fp8": ONNX_FP8}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    Device.clock = VirtualClock(monkeypatch)


def publish(store: BundleStore, divisor: float = 64) -> Bundle:
    """A bundle with three graphs, all of the same network."""
    with store.staging("colours") as staging:
        for file in GRAPHS.values():
            write_colour_graph(staging / file, divisor)
        (staging / LABELS).write_text("\n".join(COLOURS))
        (staging / WEIGHTS).write_bytes(b"none")
        passed = {"verification": dict.fromkeys(GRAPHS.values(), PASSED)}
        return store.publish(staging, colour_manifest("colours").model_copy(update=passed))


class Device(TensorRt):
    """Its plans are `Precision`s; `odd` says what is the matter with some."""

    clock: VirtualClock

    def __init__(self, odd: dict[str, str], version: str = "11.4") -> None:
        self.cuda: Any = SimpleNamespace(gpu=Gpu("NVIDIA H200", "9.0"))
        self.module: Any = SimpleNamespace(__version__=version)
        self.engines = None
        self.odd = odd
        self.closed: list[str] = []

    def load(self, plan: Any, largest: int) -> Any:
        precision, graph = plan
        odd = self.odd.get(precision)
        if odd == "lost":
            raise RuntimeUnavailableError("the GPU is lost")
        runtime = OnnxRuntime(graph, cuda=False, precision=precision)
        run, close, clock = runtime.run, runtime.close, self.clock

        def odd_run(frames: Any) -> Any:
            clock.advance(0.05 if odd == "slow" else 0.01)
            if odd == "failing":
                raise CudaError("an illegal memory access was encountered")
            answers = run(frames)
            return answers._replace(logits=answers.logits * 2) if odd == "wrong" else answers

        def noted_close() -> None:
            self.closed.append(precision)
            close()

        facts = {"engine": "tensorrt", "device": "cuda", "gpu": 0, "batches": BATCHES, "slots": 2}
        return SimpleNamespace(run=odd_run, close=noted_close, precision=precision, **facts)


def measure(bundle: Bundle, device: Device) -> Any:
    def build(precision: str) -> Any:
        if device.odd.get(precision) == "unbuilt":
            raise PlanError("TensorRT gave no reason")
        return precision, bundle.file(GRAPHS[precision])

    (bundle.path / "engines").mkdir(exist_ok=True)
    return measure_fastest(bundle, device, BATCHES, 3, build, rounds=1)


def precision_of_auto(bundle: Bundle, device: Device) -> str:
    return device.wanted(bundle, "auto", BATCHES).key.precision


def test_auto_takes_what_was_fastest_and_no_longer_what_makers_say(store: BundleStore) -> None:
    bundle, device = publish(store), Device({"fp8": "slow", "float32": "slow"})
    assert precision_of_auto(bundle, device) == "fp8"
    found = measure(bundle, device)
    assert found.order[0] == "fp16"
    assert set(found.milliseconds) == {"fp8", "fp16", "float32"}
    assert found.batch == 3
    assert precision_of_auto(bundle, device) == "fp16"
    assert device.wanted(bundle, "fp8", BATCHES).key.precision == "fp8", "one that is named stays"
    assert sorted(device.closed) == ["float32", "fp16", "fp8"]


def test_what_is_wrong_lost_or_cannot_be_built_is_left_out_and_says_why(store: BundleStore) -> None:
    bundle, device = publish(store), Device({"fp8": "wrong", "fp16": "unbuilt"})
    assert "illegal memory access" in measure(bundle, Device({"fp8": "failing"})).refused["fp8"]
    found = measure(bundle, device)
    assert found.order == ("float32",)
    assert "answers are not the network's on cuda:0: logits differ by" in found.refused["fp8"]
    assert found.refused["fp16"] == "TensorRT gave no reason"
    assert precision_of_auto(bundle, device) == "float32"
    assert sorted(device.closed) == ["float32", "fp8"], "nothing stays on the device"


def test_with_nothing_left_it_is_an_error_and_what_was_known_stays(store: BundleStore) -> None:
    bundle = publish(store)
    measure(bundle, Device({"fp8": "slow", "float32": "slow"}))
    bad = Device({"fp8": "wrong", "fp16": "lost", "float32": "lost"})
    with pytest.raises(
        PlanError, match=r"no plan that can serve here: fp8: the engine's answers.*GPU is lost"
    ):
        measure(bundle, bad)
    assert precision_of_auto(bundle, bad) == "fp16"


def test_where_plans_cannot_be_written_to_it_says_so(
    store: BundleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    bundle = publish(store)
    monkeypatch.setattr("model.files.os.open", refuse)
    with (
        pytest.raises(PlanError, match=r"cannot write into .*engines: Permission denied"),
        locked(bundle.path / "engines" / "a.fastest"),
    ):
        pass


def test_it_holds_for_this_gpu_this_tensorrt_and_these_graphs_alone(
    store: BundleStore, tmp_path: Path
) -> None:
    bundle, device = publish(store), Device({"fp8": "slow", "float32": "slow"})
    measure(bundle, device)
    (note,) = engines_folder(bundle).glob("*.fastest")
    other = publish(store, divisor=65)
    (other.path / "engines").mkdir()
    (other.path / "engines" / note.name).write_bytes(note.read_bytes())
    assert precision_of_auto(other, device) == "fp8"
    newer = Device({}, version="11.5")
    assert precision_of_auto(bundle, newer) == "fp8"
    note.with_name(note.name.replace("11.4", "11.5")).write_bytes(note.read_bytes())
    assert precision_of_auto(bundle, newer) == "fp8"
    note.write_text("{")
    assert precision_of_auto(bundle, device) == "fp8"
