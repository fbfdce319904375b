"""With precision `auto` a graph whose plan comes to nothing is told and the next one is tried.

The GPU is made up, as in `test_engines`; the bundle has the same graph in three precisions.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle import BundleStore, Candidate
from export.manifest import ONNX_FLOAT32, ONNX_FP8, ONNX_FP16
from export.runtime.interface import Outputs, RuntimeUnavailableError
from export.runtime.plans import Plan, PlanError
from export.tensorrt import BuildJob
from service.engines import BUILDING, Engines
from service.labelling.here import load
from service.settings import load_settings
from tests.service.test_engines import FakeGpu, label, state, write_plan
from tests.service.test_models import DEMO, metric, wait_until

NULLPTR = TypeError("factory function returned nullptr")


class PickyGpu(FakeGpu):
    """Does not load plans of some precisions, and computes others wrongly."""

    def __init__(self, graph: Path) -> None:
        super().__init__(graph)
        self.refuses: dict[str, Exception] = {}
        self.wrong: set[str] = set()

    def load(self, plan: Plan, largest: int) -> Any:
        precision = plan.facts.key.precision
        if precision in self.refuses:
            raise self.refuses[precision]
        runtime = super().load(plan, largest)
        runtime.precision, right = precision, runtime.run

        def run(frames: np.ndarray) -> Outputs:
            logits, embedding = right(frames)
            return Outputs(logits[:, ::-1], embedding)

        if precision in self.wrong:
            runtime.run = run
        return runtime


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Two versions of the demo model in FP8, FP16 and float32, the first of them active."""
    store = BundleStore(tmp_path / "store")
    parity = DEMO.manifest.verification[ONNX_FLOAT32]
    verification = {**DEMO.manifest.verification, ONNX_FP8: parity, ONNX_FP16: parity}
    for _ in range(2):
        with store.staging("demo") as staging:
            for file in DEMO.manifest.files:
                shutil.copy(DEMO.path / file, staging / file)
            for file in (ONNX_FP8, ONNX_FP16):
                shutil.copy(DEMO.path / ONNX_FLOAT32, staging / file)
            store.publish(staging, DEMO.manifest.model_copy(update={"verification": verification}))
    store.activate("demo", "1")
    return store


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, store: BundleStore) -> PickyGpu:
    gpu = PickyGpu(store.open("demo").file(ONNX_FLOAT32))
    for module in ("service.models", "service.labelling.here"):
        monkeypatch.setattr(f"{module}.find_tensorrt", lambda settings: ((gpu,), BUILDING))
    return gpu


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Precisions that were built, in the place of the builder's child process."""
    return install_builder(monkeypatch, write_plan)


def install_builder(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[BuildJob], Plan]
) -> list[str]:
    precisions: list[str] = []

    def called(job: BuildJob, progress: Any, on_start: Any) -> Plan:
        precisions.append(job.key.precision)
        return build(job)

    monkeypatch.setattr("service.engines.build_plan", called)
    return precisions


def fail_to_build(*precisions: str) -> Callable[[BuildJob], Plan]:
    def build(job: BuildJob) -> Plan:
        if job.key.precision in precisions:
            raise PlanError(f"no {job.key.precision} kernel")
        return write_plan(job)

    return build


def options(store: BundleStore, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"store": store.root, "spool_dir": tmp_path, "precision": "auto", **more}


def test_a_plan_that_cannot_be_built_makes_room_for_the_next_one(
    serve: Any,
    store: BundleStore,
    gpu: PickyGpu,
    monkeypatch: pytest.MonkeyPatch,
    video: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    built = install_builder(monkeypatch, fail_to_build("fp8"))
    with serve(**options(store, tmp_path)) as client:
        told = ("tensorrt", "serving: not in fp8: no fp8 kernel")
        wait_until(lambda: state(client) == told)
        assert client.get("/health/ready").json()["precision"] == "fp16"
        assert metric(client, 'timesformer_tensorrt{model="demo",state="serving"}') == 1
        label(client, video)
    assert built == ["fp8", "fp16"]
    logged = [vars(record) for record in caplog.records if record.message == "TensorRT"]
    assert [(each["state"], each["levelname"]) for each in logged] == [
        ("building", "WARNING"),
        ("serving", "WARNING"),
    ]
    assert logged[-1]["reason"] == "not in fp8: no fp8 kernel"


def test_what_is_next_is_looked_up_beside_the_event_loop(
    serve: Any,
    store: BundleStore,
    gpu: PickyGpu,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It reads files."""
    asked: list[tuple[str, bool]] = []

    def watch(name: str) -> None:
        honest = getattr(Engines, name)

        def called(*given: Any) -> Any:
            asked.append((name, asyncio._get_running_loop() is not None))
            return honest(*given)

        monkeypatch.setattr(Engines, name, called)

    watch("precision")
    watch("after")
    install_builder(monkeypatch, fail_to_build("fp8"))
    with serve(**options(store, tmp_path)) as client:
        wait_until(lambda: state(client)[1].startswith("serving"))
    assert set(asked) == {("precision", False), ("after", False)}


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (RuntimeUnavailableError("out of memory"), "out of memory"),
        (NULLPTR, "factory function returned nullptr"),
        (None, "answers are not the network's"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_so_does_one_that_cannot_be_loaded_or_is_wrong(
    serve: Any,
    store: BundleStore,
    gpu: PickyGpu,
    built: list[str],
    tmp_path: Path,
    how: Exception | None,
    why: str,
    there: bool,
) -> None:
    if how is None:
        gpu.wrong.add("fp8")
    else:
        gpu.refuses["fp8"] = how
    if there:
        bundle = store.open("demo")
        for precision in ("fp8", "fp16"):
            write_plan(BuildJob.of(gpu.wanted(bundle, precision, (1, 8, 32))))
    with serve(**options(store, tmp_path)) as client:
        if not there:
            wait_until(lambda: state(client)[0] == "tensorrt")
        engine, told = state(client)
        assert engine == "tensorrt"
        assert told.startswith("serving: not in fp8: ")
        assert why in told
        assert client.get("/health/ready").json()["precision"] == "fp16"
    assert built == ([] if there else ["fp8", "fp16"])
    assert gpu.closed == len(gpu.loaded)


def test_where_none_is_left_every_reason_is_told_and_onnx_runtime_goes_on(
    serve: Any,
    store: BundleStore,
    gpu: PickyGpu,
    monkeypatch: pytest.MonkeyPatch,
    video: Path,
    tmp_path: Path,
) -> None:
    built = install_builder(monkeypatch, fail_to_build("fp8", "fp16"))
    gpu.refuses["float32"] = NULLPTR
    with serve(**options(store, tmp_path)) as client:
        wait_until(lambda: state(client)[1].startswith("failed"))
        engine, told = state(client)
        assert engine == "onnxruntime"
        assert told.startswith("failed: not in fp8: no fp8 kernel; not in fp16: no fp16 kernel; ")
        assert "not in float32: " in told
        assert "nullptr" in told
        label(client, video)
        assert metric(client, 'timesformer_tensorrt{model="demo",state="failed"}') == 1
    assert built == ["fp8", "fp16", "float32"]


def test_a_precision_that_is_named_has_no_next_one(
    serve: Any,
    store: BundleStore,
    gpu: PickyGpu,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    built = install_builder(monkeypatch, fail_to_build("fp8"))
    with serve(**options(store, tmp_path, precision="fp8")) as client:
        wait_until(lambda: state(client) == ("onnxruntime", "failed: no fp8 kernel"))
    assert built == ["fp8"]


def test_a_tensorrt_that_cannot_start_is_told_and_onnx_runtime_serves(
    serve: Any, store: BundleStore, gpu: PickyGpu, built: list[str], video: Path, tmp_path: Path
) -> None:
    """The binding's own error, from the start, with the plan there."""
    write_plan(BuildJob.of(gpu.wanted(store.open("demo"), "fp16", (1, 8, 32))))
    gpu.refuses["fp16"] = NULLPTR
    with serve(**options(store, tmp_path, precision="fp16")) as client:
        engine, told = state(client)
        assert engine == "onnxruntime"
        assert told.startswith("failed: ")
        assert "factory function returned nullptr" in told
        label(client, video)
    assert built == []


class TestStandIn:
    """The FP16 plan is there from the start, the one in FP8 is yet to be built."""

    @pytest.fixture(autouse=True)
    def fp16_is_there(self, store: BundleStore, gpu: PickyGpu) -> None:
        write_plan(BuildJob.of(gpu.wanted(store.open("demo"), "fp16", (1, 8, 32))))

    def test_a_later_precision_serves_while_the_first_is_built(
        self,
        serve: Any,
        store: BundleStore,
        gpu: PickyGpu,
        monkeypatch: pytest.MonkeyPatch,
        video: Path,
        tmp_path: Path,
    ) -> None:
        go_on = threading.Event()

        def build(job: BuildJob) -> Plan:
            assert go_on.wait(60)
            return write_plan(job)

        built = install_builder(monkeypatch, build)
        with serve(**options(store, tmp_path)) as client:
            assert state(client) == ("tensorrt", "building")
            assert client.get("/health/ready").json()["precision"] == "fp16"
            label(client, video)
            go_on.set()
            wait_until(lambda: state(client) == ("tensorrt", "serving"))
            assert client.get("/health/ready").json()["precision"] == "fp8"
        assert built == ["fp8"]
        assert gpu.closed == len(gpu.loaded) == 2

    def test_it_goes_on_where_the_first_comes_to_nothing(
        self,
        serve: Any,
        store: BundleStore,
        gpu: PickyGpu,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        built = install_builder(monkeypatch, fail_to_build("fp8"))
        with serve(**options(store, tmp_path)) as client:
            told = ("tensorrt", "serving: not in fp8: no fp8 kernel")
            wait_until(lambda: state(client) == told)
        assert built == ["fp8"]
        assert gpu.closed == len(gpu.loaded) == 1, "it was not loaded again"

    def test_one_that_is_wrong_does_not(
        self, serve: Any, store: BundleStore, gpu: PickyGpu, built: list[str], tmp_path: Path
    ) -> None:
        gpu.wrong.add("fp16")
        bundle = store.open("demo")
        engines = Engines((gpu,), 16, "auto")  # type: ignore[arg-type]
        assert engines.stand_in(bundle, ()) is None
        assert gpu.closed == len(gpu.loaded) == 1
        write_plan(BuildJob.of(gpu.wanted(bundle, "float32", (1, 8, 32))))
        (runtime,) = engines.stand_in(bundle, ()) or ()
        assert runtime.precision == "float32"
        runtime.close()

    def test_a_precision_that_is_named_has_none(self, store: BundleStore, gpu: PickyGpu) -> None:
        engines = Engines((gpu,), 16, "fp8")  # type: ignore[arg-type]
        assert engines.stand_in(store.open("demo"), ()) is None
        assert gpu.loaded == []


def test_a_candidate_gets_the_next_one_too(
    serve: Any,
    store: BundleStore,
    gpu: PickyGpu,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    built = install_builder(monkeypatch, fail_to_build("fp8"))
    with serve(**options(store, tmp_path, watch_interval_s=0.05)) as client:
        wait_until(lambda: state(client)[0] == "tensorrt")
        store.try_candidate("demo", Candidate(version="2", mode="canary", share=1.0))
        wait_until(lambda: len(gpu.loaded) == 2)
    assert built == ["fp8", "fp16", "fp8", "fp16"]
    assert gpu.loaded[-1].parent.parent.name == "2"


def test_labelling_tells_what_it_does_not_run_in(
    store: BundleStore, gpu: PickyGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = store.open("demo")
    for precision in ("fp8", "fp16"):
        write_plan(BuildJob.of(gpu.wanted(bundle, precision, (1, 8, 32))))
    gpu.refuses["fp8"] = RuntimeUnavailableError("out of memory")
    model = load(bundle, load_settings(**options(store, tmp_path)))
    assert model.runtime.precision == "fp16"
    assert "TensorRT is serving: not in fp8: out of memory" in caplog.text
    model.close()
