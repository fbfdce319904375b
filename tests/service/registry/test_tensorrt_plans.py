"""TensorRT at serving: ONNX Runtime answers while no plan serves, then the plan does."""

from __future__ import annotations

import os
import re
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from export.bundle.bundle import Bundle, BundleStore, Candidate
from export.bundle.manifest import ONNX_FLOAT32, ONNX_FP8, ONNX_FP16, Choice
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import GPU_GRAPHS, Plan, PlanError, graph_of
from export.tensorrt.builder import BuildJob, build_plan
from service.offline.local_runner import load
from service.registry.loading import load_model
from service.registry.tensorrt_plans import BUILDING, Engines, find_tensorrt
from service.settings import load_settings
from tests.service.conftest import Serve
from tests.service.registry.fake_gpu import (
    FakeBuilder,
    FakeGpu,
    build_ahead,
    install_cuda,
    install_gpus,
    label,
    state,
)
from tests.service.registry.test_models import DEMO, metric, publish, serving, wait_until


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
def gpu(monkeypatch: pytest.MonkeyPatch, store: BundleStore) -> FakeGpu:
    (gpu,) = install_gpus(monkeypatch, store, "Fake")
    return gpu


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    return FakeBuilder(monkeypatch)


@pytest.fixture
def start(serve: Serve, store: BundleStore, tmp_path: Path) -> Serve:
    """Starts a service of that store, which follows the store closely."""
    return partial(serve, store=store.root, spool_dir=tmp_path, watch_interval_s=0.05)


def test_without_a_plan_onnx_runtime_serves_until_the_plan_is_built(
    start: Serve, gpu: FakeGpu, builder: FakeBuilder, video: Path
) -> None:
    builder.go_on.clear()
    with start() as client:
        assert state(client) == ("onnxruntime", "building")
        assert metric(client, 'timesformer_tensorrt{model="demo",state="building"}') == 1
        before = label(client, video)
        builder.go_on.set()
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        assert label(client, video) == before
        (model,) = client.get("/v1/models").json()["models"]
        assert (model["provider"], model["tensorrt"]) == ("TensorRT 11", "serving")
        assert metric(client, 'timesformer_tensorrt{model="demo",state="serving"}') == 1
        assert metric(client, 'timesformer_tensorrt{model="demo",state="building"}') == 0
        assert metric(client, 'timesformer_swaps_total{model="demo",result="done"}') == 0, (
            "no other bundle"
        )
    assert gpu.closed == len(gpu.loaded) == 1


def test_prebuilt_plans_that_are_missing_are_reported_and_not_built(
    start: Serve,
    store: BundleStore,
    gpu: FakeGpu,
    builder: FakeBuilder,
    video: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build_ahead(gpu, store.open("demo", "2"))
    with start(tensorrt="prebuilt") as client:
        engine, status = state(client)
        assert engine == "onnxruntime"
        assert status.startswith("missing: no plan fits: run `timesformer engines build`")
        assert metric(client, 'timesformer_tensorrt{model="demo",state="missing"}') == 1
        label(client, video)
        store.activate("demo", "2")
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
    assert not builder.jobs
    levels = [each.levelname for each in caplog.records if each.message == "TensorRT"]
    assert levels == ["WARNING"]


@pytest.mark.parametrize(
    ("how", "there", "why"),
    [
        ("unbuilt", False, "no fp8 kernel"),
        (TypeError("factory function returned nullptr"), True, "returned nullptr"),
        ("wrong", True, "answers are not the network's"),
    ],
)
def test_a_plan_that_fails_is_reported_and_onnx_runtime_serves(
    start: Serve,
    store: BundleStore,
    gpu: FakeGpu,
    builder: FakeBuilder,
    video: Path,
    caplog: pytest.LogCaptureFixture,
    how: Exception | str,
    there: bool,
    why: str,
) -> None:
    if isinstance(how, Exception):
        gpu.refuses["fp8"] = how
    elif how == "wrong":
        gpu.wrong.add("fp8")
    else:
        builder.fails["1"] = why
    if there:
        build_ahead(gpu, store.open("demo"), "fp8")
    build_ahead(gpu, store.open("demo"), "fp16")  # the other precisions are not tried
    with start(precision="auto") as client:
        wait_until(lambda: state(client)[1].startswith("failed: fp8: "))
        engine, status = state(client)
        assert engine == "onnxruntime"
        assert why in status
        assert "`timesformer engines choose`" in status
        assert metric(client, 'timesformer_tensorrt{model="demo",state="failed"}') == 1
        label(client, video)
    assert len(builder.jobs) == (not there)
    assert gpu.closed == len(gpu.loaded)
    *_, logged = [vars(each) for each in caplog.records if each.message == "TensorRT"]
    assert logged["levelname"] == "ERROR"
    assert why in logged["reason"]


def test_a_version_that_is_activated_meanwhile_is_built_next(
    start: Serve, store: BundleStore, gpu: FakeGpu, builder: FakeBuilder
) -> None:
    builder.go_on.clear()
    with start() as client:
        wait_until(lambda: builder.versions == ["1"])
        store.activate("demo", "2")
        wait_until(lambda: serving(client) == "2")
        assert state(client) == ("onnxruntime", "building")
        builder.go_on.set()
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        assert builder.versions == ["1", "2"]
        assert gpu.loaded[-1].parent.parent.name == "2"


def test_a_candidate_gets_its_plan_while_it_is_tried_and_keeps_it_once_active(
    start: Serve, store: BundleStore, gpu: FakeGpu, builder: FakeBuilder, video: Path
) -> None:
    with start() as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        builder.go_on.clear()
        store.try_candidate("demo", Candidate(version="2", mode="canary", share=1.0))
        wait_until(lambda: builder.versions == ["1", "2"])
        before = label(client, video)
        answered = 'timesformer_candidate_requests_total{model="demo",result="answered"}'
        wait_until(lambda: metric(client, answered) == 1)
        builder.go_on.set()
        wait_until(lambda: len(gpu.loaded) == 2)
        assert gpu.loaded[-1].parent.parent.name == "2"
        ran = gpu.ran
        wait_until(lambda: label(client, video) == before and gpu.ran > ran)
        assert state(client) == ("tensorrt", "serving"), "what serves is as it was"
        store.activate("demo", "2")
        wait_until(lambda: serving(client) == "2")
        assert state(client) == ("tensorrt", "serving")
    assert builder.versions == ["1", "2"], "it was not built again"
    assert gpu.closed == len(gpu.loaded) == 2


def test_a_candidate_whose_plan_cannot_be_built_is_tried_without_and_not_built_again(
    start: Serve, store: BundleStore, gpu: FakeGpu, builder: FakeBuilder, video: Path
) -> None:
    builder.fails["2"] = "myelin gave up"
    with start() as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        store.try_candidate("demo", Candidate(version="2", mode="canary", share=1.0))
        wait_until(lambda: builder.versions == ["1", "2"])
        label(client, video)
        answered = 'timesformer_candidate_requests_total{model="demo",result="answered"}'
        wait_until(lambda: metric(client, answered) == 1)
        assert state(client) == ("tensorrt", "serving")
        store.activate("demo", "2")
        wait_until(lambda: state(client) == ("onnxruntime", "failed: myelin gave up"))
    assert builder.versions == ["1", "2"]


def test_the_service_stops_while_a_plan_is_built(
    start: Serve,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "sleeping.py").write_text("import time\ntime.sleep(600)\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", paths)
    children: list[Any] = []

    def build(job: BuildJob, progress: Any, on_start: Any) -> Plan:
        def started(child: Any) -> None:
            children.append(child)
            on_start(child)

        sleeping = job.model_copy(update={"module": "sleeping"})
        return build_plan(sleeping, progress, started)

    monkeypatch.setattr("service.registry.tensorrt_plans.build_plan", build)
    with start() as client:
        wait_until(lambda: children)
        assert state(client)[1] == "building"
    assert children[0].poll() is not None, "the child is gone"
    assert "ERROR" not in [record.levelname for record in caplog.records]


def test_a_refitted_plan_with_wrong_answers_is_built_instead(
    start: Serve,
    store: BundleStore,
    gpu: FakeGpu,
    builder: FakeBuilder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refits: list[bool] = []
    real = builder._build

    def build(job: BuildJob, *rest: Any, **options: Any) -> Plan:
        refits.append(bool(job.refit_from))
        gpu.wrong = {"float32"} if job.refit_from else set()
        builder.facts = {"refittable": True, "refitted": bool(job.refit_from)}
        return real(job, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.registry.tensorrt_plans.build_plan", build)
        with start(refittable_plans=True) as client:
            wait_until(lambda: state(client) == ("tensorrt", "serving"))
            store.activate("demo", "2")
            wait_until(lambda: len(refits) == 3)
            wait_until(lambda: state(client) == ("tensorrt", "serving"))
            assert serving(client) == "2"
    assert refits == [False, True, False]
    assert "refitted plan refused" in caplog.text


def test_several_models_build_their_plans_one_after_the_other(
    start: Serve,
    store: BundleStore,
    gpu: FakeGpu,
    builder: FakeBuilder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("one", "two"):
        with store.staging(name) as staging:
            for file in DEMO.manifest.files:
                shutil.copy(DEMO.path / file, staging / file)
            store.publish(staging, DEMO.manifest.model_copy(update={"name": name}))
        store.activate(name, "1")
    builder.facts = {"warnings": ("no matrix product computes in FP8",)}
    running, most, lock = 0, 0, threading.Lock()
    honest = Engines.build

    def counted(*given: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return honest(*given)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(Engines, "build", counted)
    with start(model="*") as client:

        def serving_tensorrt() -> int:
            models = client.get("/v1/models").json()["models"]
            return sum(model["tensorrt"] == "serving" for model in models)

        wait_until(lambda: serving_tensorrt() == 3)
    assert most == 1, "a model that waits for its build occupies no thread"
    assert len(builder.jobs) == 3
    told = [vars(each) for each in caplog.records if each.message == "plan built with a warning"]
    assert [each["reason"] for each in told] == ["no matrix product computes in FP8"] * 3


def test_settings_that_turn_tensorrt_off() -> None:
    for settings in (load_settings(tensorrt="off"), load_settings(device="cpu")):
        found, why = find_tensorrt(settings)
        assert (found, why.state) == ((), "off")
        assert why.reason


def test_a_machine_without_a_gpu_says_what_is_missing(
    store: BundleStore, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load_settings(store=store.root, precision="fp8")
    found, why = find_tensorrt(settings)
    assert (found, why.state) == ((), "unavailable")
    assert re.search("precision fp8 needs TensorRT: .*(cuda-bindings|driver)", caplog.text)
    with pytest.raises(RuntimeUnavailableError, match="set the precision to auto"):
        load_model(store.open("demo"), settings)


def test_labelling_uses_a_plan_that_is_there_and_reports_why_none_serves(
    store: BundleStore, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = store.open("demo")
    settings = load_settings(store=store.root, device="cpu")
    model = load(bundle, settings)
    assert model.runtime.engine == "onnxruntime"
    assert "TensorRT is missing: no plan fits" in caplog.text
    model.close()
    build_ahead(gpu, bundle)
    model = load(bundle, settings)
    assert model.runtime.engine == "tensorrt"
    model.close()


class TestWhichGraph:
    """Of a bundle that holds one of each kind."""

    @pytest.fixture
    def bundle(self, store: BundleStore) -> Bundle:
        bundle = store.open("demo")
        entry = bundle.manifest.files[ONNX_FLOAT32]
        files = {**bundle.manifest.files, **dict.fromkeys(GPU_GRAPHS.values(), entry)}
        bundle.manifest = bundle.manifest.model_copy(update={"files": files})
        return bundle

    @pytest.mark.parametrize(
        ("capability", "taken"), [("9.0", "fp8"), ("8.9", "fp8"), ("8.6", "int8"), ("10.0", "fp8")]
    )
    def test_auto_takes_the_fastest_that_the_gpu_computes_in(
        self, bundle: Bundle, capability: str, taken: str
    ) -> None:
        precision, path, _ = graph_of(bundle, "auto", capability)
        assert (precision, path.name) == (taken, GPU_GRAPHS[taken])

    def test_auto_keeps_to_the_order_that_the_export_found(self, bundle: Bundle) -> None:
        choice = Choice(order=("fp16", "float32"), reason="measured", milliseconds=None)
        bundle.manifest = bundle.manifest.model_copy(update={"fastest": {"gpu": choice}})
        assert graph_of(bundle, "auto", "9.0")[0] == "fp16"
        assert graph_of(bundle, "int8", "9.0")[0] == "int8"

    def test_fp8_on_a_gpu_without_it_is_an_error(self, bundle: Bundle) -> None:
        with pytest.raises(PlanError, match=r"8\.6 has no fp8: it takes 8\.9"):
            graph_of(bundle, "fp8", "8.6")

    def test_a_precision_that_was_not_exported_is_an_error_that_says_how(self) -> None:
        with pytest.raises(PlanError, match="export it with --precision fp8"):
            graph_of(DEMO, "fp8", "9.0")


class TestOnnxRuntimeOnGpus:
    """Which graph ONNX Runtime serves on a GPU, where no plan serves."""

    @pytest.fixture(autouse=True)
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
        return install_cuda(monkeypatch)

    @pytest.fixture
    def engines(self, gpu: FakeGpu) -> Any:
        return lambda precision: Engines((gpu,), 16, precision)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("precision", "served"),
        [("auto", "fp16"), ("fp8", "fp16"), ("fp16", "fp16"), ("float32", "float32")],
    )
    def test_it_serves_fp16_unless_float32_is_asked_for(
        self, store: BundleStore, engines: Any, precision: str, served: str
    ) -> None:
        settings = load_settings(precision=precision)
        model = load_model(store.open("demo"), settings, engines(precision))
        assert (model.runtime.device, model.runtime.precision) == ("cuda", served)
        assert model.tensorrt == BUILDING
        model.close()

    def test_a_bundle_without_fp16_is_served_in_float32(self, tmp_path: Path, engines: Any) -> None:
        bundle = publish(BundleStore(tmp_path / "plain"))
        model = load_model(bundle, load_settings(precision="fp8"), engines("fp8"))
        assert (model.runtime.device, model.runtime.precision) == ("cuda", "float32")
        assert model.tensorrt.state == "failed"
        model.close()

    def test_without_tensorrt_fp16_is_served_too(self, store: BundleStore) -> None:
        for precision in ("auto", "fp16"):
            model = load_model(store.open("demo"), load_settings(precision=precision))
            assert (model.runtime.device, model.runtime.precision) == ("cuda", "fp16")
            model.close()
        with pytest.raises(RuntimeUnavailableError, match="fp8 cannot be served"):
            load_model(store.open("demo"), load_settings(precision="fp8"))

    @pytest.mark.parametrize("how", ["wrong", "raises", "cannot be loaded"])
    def test_fp16_that_fails_here_is_reported_and_float32_serves(
        self,
        store: BundleStore,
        engines: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        how: str,
    ) -> None:
        real_load, real_run = OnnxRuntime.__init__, OnnxRuntime.run
        closed: list[str] = []

        def load(self: OnnxRuntime, *given: Any, precision: str = "float32", **rest: Any) -> None:
            if precision == "fp16" and how == "cannot be loaded":
                raise RuntimeUnavailableError("no such kernel")
            real_load(self, *given, precision=precision, **rest)

        def run(self: OnnxRuntime, frames: Any) -> Any:
            answers = real_run(self, frames)
            if self.precision == "fp16" and how == "raises":
                raise RuntimeError("no such kernel")
            wrong = self.precision == "fp16"
            return answers._replace(logits=-answers.logits) if wrong else answers

        monkeypatch.setattr(OnnxRuntime, "__init__", load)
        monkeypatch.setattr(OnnxRuntime, "run", run)
        monkeypatch.setattr(OnnxRuntime, "close", lambda self: closed.append(self.precision))
        model = load_model(store.open("demo"), load_settings(precision="auto"), engines("auto"))
        assert (model.runtime.device, model.runtime.precision) == ("cuda", "float32")
        assert closed.count("fp16") == (how != "cannot be loaded")
        (told,) = [each for each in caplog.records if "cannot serve FP16" in each.message]
        reason = "answers are not the network's" if how == "wrong" else "no such kernel"
        assert reason in vars(told)["reason"]
