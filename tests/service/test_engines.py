"""TensorRT at serving: ONNX Runtime answers while a plan is built, then the plan does.

The GPU is made up: its engine is ONNX Runtime under another name. All around it is real.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle import Bundle, BundleStore, Candidate
from export.manifest import ONNX_FLOAT32, Choice, FileEntry
from export.runtime.interface import Outputs, RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import (
    GPU_GRAPHS,
    Plan,
    PlanError,
    PlanFacts,
    PlanKey,
    engines_folder,
    find_plan,
    graph_of,
)
from export.runtime.tensorrt import Wanted
from export.tensorrt import BuildJob, build_plan
from service.engines import BUILDING, Engines, Refused, TensorRtState, find_tensorrt
from service.hosting import _level
from service.loading import load_model
from service.settings import load_settings
from tests.service.test_models import DEMO, metric, publish, serving, wait_until


class FakeGpu:
    """Stands for `TensorRt`; what it loads is the bundle's own graph, times `factor`."""

    def __init__(
        self, graph: Path, factor: float = 1.0, *, index: int = 0, name: str = "Fake"
    ) -> None:
        self.cuda = SimpleNamespace(index=index)
        self.graph, self.factor, self.name = graph, factor, name
        self.fails: str | None = None
        self.ran = 0
        self.loaded: list[Path] = []
        self.closed = 0

    def wanted(
        self,
        bundle: Bundle,
        precision: str,
        batches: tuple[int, ...],
        refused: Collection[str] = (),
    ) -> Wanted:
        found, graph, sha256 = graph_of(bundle, precision, "9.0", refused)
        key = PlanKey(
            gpu=self.name,
            compute_capability="9.0",
            tensorrt="11",
            precision=found,
            batches=batches,
        )
        return Wanted(key, graph, sha256, engines_folder(bundle))

    def load(self, plan: Plan, largest: int) -> Any:
        if self.fails is not None:
            raise RuntimeUnavailableError(self.fails)
        self.loaded.append(plan.path)
        session = OnnxRuntime(self.graph, cuda=False, threads=1)

        def run(frames: np.ndarray) -> Outputs:
            self.ran += 1
            logits, embedding = session.run(frames)
            return Outputs(logits * np.float32(self.factor), embedding)

        def close() -> None:
            self.closed += 1
            session.close()

        facts = {"engine": "tensorrt", "provider": "TensorRT 11", "device": "cuda"}
        shape = {"gpu": self.cuda.index, "slots": 2, "batches": (1, 8, 16)}
        return SimpleNamespace(**facts, **shape, precision="float32", run=run, close=close)


def write_plan(job: BuildJob, **told: Any) -> Plan:
    """A plan of that job; `told` are facts of it."""
    job.folder.mkdir(exist_ok=True)
    job.plan.write_bytes(b"a plan")
    facts = PlanFacts(
        key=job.key,
        graph_sha256=job.graph_sha256,
        plan=FileEntry(sha256=hashlib.sha256(b"a plan").hexdigest(), size=6),
        created=datetime.now(UTC),
        seconds=1,
        refittable=False,
        level=3,
        structure="",
        network={},
    )
    facts = facts.model_copy(update=told)
    job.plan.with_suffix(".json").write_text(facts.model_dump_json())
    found = find_plan(job.folder, job.key, job.graph_sha256)
    assert found is not None
    return found


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Two good versions of the demo model, the first of them active."""
    store = BundleStore(tmp_path / "store")
    publish(store), publish(store)
    store.activate("demo", "1")
    return store


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, store: BundleStore) -> FakeGpu:
    gpu = FakeGpu(store.open("demo").file(ONNX_FLOAT32))
    monkeypatch.setattr("service.models.find_tensorrt", lambda settings: ((gpu,), BUILDING))
    return gpu


Builder = Callable[[Callable[[BuildJob], Plan]], None]


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    """Puts a function in the place of the builder's child process."""

    def install(build: Callable[[BuildJob], Plan]) -> None:
        monkeypatch.setattr(
            "service.engines.build_plan", lambda job, progress, on_start: build(job)
        )

    return install


def state(client: httpx.Client) -> tuple[str, str]:
    ready = client.get("/health/ready").json()
    return ready["engine"], ready["tensorrt"]


def label(client: httpx.Client, video: Path) -> str:
    answer = client.post("/v1/classify", content=video.read_bytes())
    assert answer.status_code == 200
    return str(answer.json()["predictions"][0]["label"])


def test_onnx_runtime_serves_until_the_plan_is_built_and_then_the_plan_does(
    serve: Any, store: BundleStore, gpu: FakeGpu, builder: Builder, video: Path, tmp_path: Path
) -> None:
    go_on = threading.Event()
    builder(lambda job: go_on.wait(30) and write_plan(job))
    with serve(store=store.root, spool_dir=tmp_path) as client:
        assert state(client) == ("onnxruntime", "building")
        assert metric(client, 'timesformer_tensorrt{model="demo",state="building"}') == 1
        before = label(client, video)
        go_on.set()
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


def test_a_plan_that_is_there_serves_from_the_start(
    serve: Any, store: BundleStore, gpu: FakeGpu, builder: Builder, tmp_path: Path
) -> None:
    write_plan(BuildJob.of(gpu.wanted(store.open("demo"), "float32", (1, 8, 32))))
    builder(lambda job: pytest.fail("it was built again"))
    with serve(store=store.root, spool_dir=tmp_path) as client:
        assert state(client) == ("tensorrt", "serving")


def test_a_build_that_fails_is_told_and_onnx_runtime_goes_on(
    serve: Any,
    store: BundleStore,
    gpu: FakeGpu,
    builder: Builder,
    video: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(job: BuildJob) -> Plan:
        raise PlanError("out of workspace")

    builder(fail)
    with serve(store=store.root, spool_dir=tmp_path) as client:
        wait_until(lambda: state(client) == ("onnxruntime", "failed: out of workspace"))
        label(client, video)
        assert metric(client, 'timesformer_tensorrt{model="demo",state="failed"}') == 1
    told = [record for record in caplog.records if record.message == "TensorRT"]
    assert told[-1].levelname == "ERROR"
    assert vars(told[-1])["reason"] == "out of workspace"


@pytest.mark.parametrize("there", [True, False])
def test_a_plan_with_other_answers_serves_nobody(
    serve: Any,
    store: BundleStore,
    gpu: FakeGpu,
    builder: Builder,
    video: Path,
    tmp_path: Path,
    there: bool,
) -> None:
    gpu.factor = 1.01
    if there:
        write_plan(BuildJob.of(gpu.wanted(store.open("demo"), "float32", (1, 8, 32))))
    builder(write_plan)
    with serve(store=store.root, spool_dir=tmp_path) as client:
        wait_until(lambda: state(client)[1].startswith("failed"))
        assert "answers are not the network's" in state(client)[1]
        assert state(client)[0] == "onnxruntime"
        label(client, video)
    assert gpu.closed == len(gpu.loaded) == 1


def test_a_version_that_is_activated_meanwhile_is_built_next(
    serve: Any, store: BundleStore, gpu: FakeGpu, builder: Builder, tmp_path: Path
) -> None:
    go_on, built = threading.Event(), []

    def build(job: BuildJob) -> Plan:
        built.append(job.graph.parent.name)
        assert go_on.wait(30)
        return write_plan(job)

    builder(build)
    with serve(store=store.root, watch_interval_s=0.05, spool_dir=tmp_path) as client:
        wait_until(lambda: built == ["1"])
        store.activate("demo", "2")
        wait_until(lambda: serving(client) == "2")
        assert state(client) == ("onnxruntime", "building")
        go_on.set()
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        assert built == ["1", "2"]
        assert gpu.loaded[-1].parent.parent.name == "2"


def test_a_candidate_gets_its_plan_while_it_is_tried_and_brings_it_along(
    serve: Any, store: BundleStore, gpu: FakeGpu, builder: Builder, video: Path, tmp_path: Path
) -> None:
    go_on, built = threading.Event(), []

    def build(job: BuildJob) -> Plan:
        built.append(job.graph.parent.name)
        assert job.graph.parent.name == "1" or go_on.wait(30)
        return write_plan(job)

    builder(build)
    with serve(store=store.root, watch_interval_s=0.05, spool_dir=tmp_path) as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        store.try_candidate("demo", Candidate(version="2", mode="canary", share=1.0))
        wait_until(lambda: built == ["1", "2"])
        before = label(client, video)
        answered = 'timesformer_candidate_requests_total{model="demo",result="answered"}'
        wait_until(lambda: metric(client, answered) == 1)
        go_on.set()
        wait_until(lambda: len(gpu.loaded) == 2)
        assert gpu.loaded[-1].parent.parent.name == "2"
        ran = gpu.ran
        wait_until(lambda: label(client, video) == before and gpu.ran > ran)
        assert state(client) == ("tensorrt", "serving"), "what serves is as it was"
        store.activate("demo", "2")
        wait_until(lambda: serving(client) == "2")
        assert state(client) == ("tensorrt", "serving")
    assert built == ["1", "2"], "it was not built again"
    assert gpu.closed == len(gpu.loaded) == 2


def test_a_candidate_whose_plan_cannot_be_built_is_tried_without_and_not_built_again(
    serve: Any, store: BundleStore, gpu: FakeGpu, builder: Builder, video: Path, tmp_path: Path
) -> None:
    built = []

    def build(job: BuildJob) -> Plan:
        built.append(job.graph.parent.name)
        if job.graph.parent.name == "2":
            raise PlanError("myelin gave up")
        return write_plan(job)

    builder(build)
    with serve(store=store.root, watch_interval_s=0.05, spool_dir=tmp_path) as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        store.try_candidate("demo", Candidate(version="2", mode="canary", share=1.0))
        wait_until(lambda: built == ["1", "2"])
        label(client, video)
        answered = 'timesformer_candidate_requests_total{model="demo",result="answered"}'
        wait_until(lambda: metric(client, answered) == 1)
        assert state(client) == ("tensorrt", "serving")
        store.activate("demo", "2")
        wait_until(lambda: state(client) == ("onnxruntime", "failed: myelin gave up"))
    assert built == ["1", "2"]


def test_the_service_stops_while_a_plan_is_built(
    serve: Any,
    store: BundleStore,
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

    monkeypatch.setattr("service.engines.build_plan", build)
    with serve(store=store.root, spool_dir=tmp_path) as client:
        wait_until(lambda: children)
        assert state(client)[1] == "building"
    assert children[0].poll() is not None, "the child is gone"
    assert "ERROR" not in [record.levelname for record in caplog.records]


@pytest.mark.parametrize("refittable", [False, True])
def test_a_build_takes_what_those_of_earlier_versions_left(
    serve: Any,
    store: BundleStore,
    gpu: FakeGpu,
    builder: Builder,
    tmp_path: Path,
    refittable: bool,
) -> None:
    jobs: list[BuildJob] = []

    def build(job: BuildJob) -> Plan:
        jobs.append(job)
        plan = write_plan(job, refittable=job.refittable)
        assert job.timings is not None
        job.timings.write_bytes(b"measured")
        return plan

    builder(build)
    options = {"watch_interval_s": 0.05, "refittable_plans": refittable}
    with serve(store=store.root, spool_dir=tmp_path, **options) as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        store.activate("demo", "2")
        wait_until(lambda: len(jobs) == 2)
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
    first, second = jobs
    assert (first.earlier_timings, first.refit_from) == ((), ())
    assert second.earlier_timings == (first.timings,)
    assert second.refit_from == ((first.plan.with_suffix(".json"),) if refittable else ())
    assert (first.refittable, second.refittable) == (refittable, refittable)


@pytest.fixture
def refits(gpu: FakeGpu, builder: Builder) -> list[bool]:
    """Of each plan that is built, whether it is refitted, and so has other answers."""
    refits: list[bool] = []

    def build(job: BuildJob) -> Plan:
        refits.append(bool(job.refit_from))
        gpu.factor = 1.01 if job.refit_from else 1
        return write_plan(job, refittable=True, refitted=bool(job.refit_from))

    builder(build)
    return refits


def test_a_refitted_plan_with_other_answers_is_built_instead(
    serve: Any,
    store: BundleStore,
    refits: list[bool],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"watch_interval_s": 0.05, "refittable_plans": True}
    with serve(store=store.root, spool_dir=tmp_path, **options) as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        store.activate("demo", "2")
        wait_until(lambda: len(refits) == 3)
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        assert serving(client) == "2"
    assert refits == [False, True, False]
    assert "refitted plan refused, it is built" in caplog.text


def test_that_of_a_candidate_is_told_no_louder(
    serve: Any,
    store: BundleStore,
    refits: list[bool],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"watch_interval_s": 0.05, "refittable_plans": True}
    with serve(store=store.root, spool_dir=tmp_path, **options) as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        store.try_candidate("demo", Candidate(version="2", mode="canary", share=1.0))
        wait_until(lambda: len(refits) == 3)
    assert refits == [False, True, False]
    told = [each for each in caplog.records if each.message == "TensorRT for the candidate"]
    assert not [each for each in told if each.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("tensorrt", "level"),
    [
        (BUILDING, logging.INFO),
        (BUILDING.serving(), logging.INFO),
        (TensorRtState("serving", "", (Refused("fp8", "no kernel"),)), logging.WARNING),
        (TensorRtState("failed", "no kernel"), logging.ERROR),
    ],
)
def test_how_loudly_it_is_told(tensorrt: TensorRtState, level: int) -> None:
    assert _level(tensorrt) == level


def test_what_the_builder_warns_of_is_in_the_log(
    serve: Any,
    store: BundleStore,
    gpu: FakeGpu,
    builder: Builder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def build(job: BuildJob) -> Plan:
        return write_plan(job, warnings=("no matrix product computes in FP8",))

    builder(build)
    with serve(store=store.root, spool_dir=tmp_path) as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
    (told,) = [vars(each) for each in caplog.records if each.message == "plan built with a warning"]
    assert told["reason"] == "no matrix product computes in FP8"


def test_several_models_build_their_plans_one_after_the_other(
    serve: Any,
    store: BundleStore,
    gpu: FakeGpu,
    builder: Builder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("one", "two"):
        with store.staging(name) as staging:
            for file in DEMO.manifest.files:
                shutil.copy(DEMO.path / file, staging / file)
            store.publish(staging, DEMO.manifest.model_copy(update={"name": name}))
        store.activate(name, "1")
    go_on, running, most = threading.Event(), [], []
    in_threads, honest = [], Engines.build

    def counted(*given: Any) -> Any:
        in_threads.append(given)
        return honest(*given)

    monkeypatch.setattr(Engines, "build", counted)

    def build(job: BuildJob) -> Plan:
        running.append(job)
        most.append(len(running))
        assert go_on.wait(60)
        running.remove(job)
        return write_plan(job)

    builder(build)
    with serve(store=store.root, model="*", spool_dir=tmp_path) as client:

        def serving_tensorrt() -> int:
            models = client.get("/v1/models").json()["models"]
            return sum(model["tensorrt"] == "serving" for model in models)

        wait_until(lambda: running)
        time.sleep(0.3)  # what would begin beside it begins now
        assert len(in_threads) == 1, "the others hold no thread, which uploads need"
        go_on.set()
        wait_until(lambda: serving_tensorrt() == 3, seconds=60)
    assert most == [1, 1, 1]


def test_what_turns_tensorrt_off() -> None:
    for settings in (
        load_settings(tensorrt="off"),
        load_settings(device="cpu"),
    ):
        found, why = find_tensorrt(settings)
        assert (found, why.state) == ((), "off")
        assert why.reason


def test_a_machine_without_a_gpu_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(index: int, engines: Path | None) -> None:
        raise RuntimeUnavailableError("there is no NVIDIA driver")

    monkeypatch.setattr("service.engines.TensorRt", missing)
    found, why = find_tensorrt(load_settings())
    assert found == ()
    assert str(why) == "unavailable: there is no NVIDIA driver"


def test_on_the_cpu_the_service_says_that_tensorrt_is_off(client: httpx.Client) -> None:
    assert state(client) == ("onnxruntime", "off: the CPU is to be used")
    assert metric(client, 'timesformer_tensorrt{model="demo",state="off"}') == 1


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

    def test_a_precision_that_was_not_exported_is_an_error_that_says_how(
        self, store: BundleStore
    ) -> None:
        for precision in ("fp8", "int8", "fp16"):
            with pytest.raises(PlanError, match=f"export it with --precision {precision}"):
                graph_of(store.open("demo"), precision, "9.0")


@pytest.mark.parametrize("precision", ["int8", "fp8", "fp16"])
def test_float32_stands_in_for_a_plan_that_is_yet_to_be_built(
    precision: str, store: BundleStore, gpu: FakeGpu
) -> None:
    settings = load_settings(store=store.root, precision=precision, device="auto")
    engines: Any = SimpleNamespace(
        find=lambda bundle, refused: None, stand_in=lambda bundle, refused: None
    )
    model = load_model(store.open("demo"), settings, engines)
    assert (model.runtime.precision, model.tensorrt) == ("float32", BUILDING)
    model.runtime.close()


def test_int8_looks_for_tensorrt_and_serves_on_the_cpu_where_there_is_none(
    store: BundleStore,
) -> None:
    here, found = find_tensorrt(load_settings(store=store.root, precision="int8"))
    assert here == ()
    assert found.state == "unavailable"


def test_fp8_without_tensorrt_is_refused_and_the_log_says_what_is_missing(
    store: BundleStore, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load_settings(store=store.root, precision="fp8")
    find_tensorrt(settings)
    assert re.search("precision fp8 needs TensorRT: .*(cuda-bindings|driver)", caplog.text)
    with pytest.raises(RuntimeUnavailableError, match="set the precision to auto"):
        load_model(store.open("demo"), settings)
