"""Several GPUs behind one queue: an engine of every model on each, all of them or an error.

The GPUs are those of `fake_gpu`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from export.bundle.bundle import Bundle, BundleStore
from export.bundle.manifest import ONNX_FLOAT32
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import GPU_GRAPHS, PlanError
from export.tensorrt.builder import BuildJob
from service.observability.metrics import Metrics
from service.registry.loading import load_model
from service.registry.models import Models
from service.registry.tensorrt_plans import BUILDING, Engines, find_gpus, find_tensorrt
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
from tests.service.registry.test_models import metric, serving, store, wait_until

__all__ = ["store"]  # a fixture
LARGEST = 16


Gpus = Callable[..., tuple[FakeGpu, ...]]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, store: BundleStore) -> Gpus:
    """Makes GPUs of these kinds up and lets the service find them."""
    return lambda *kinds: install_gpus(monkeypatch, store, *kinds)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[BuildJob]:
    """The jobs of plans that were built."""
    return FakeBuilder(monkeypatch).jobs


def devices(client: httpx.Client) -> dict[str, bool]:
    engines = client.get("/health/ready").json()["engines"]
    return {engine["device"]: engine["healthy"] for engine in engines}


def infos(client: httpx.Client) -> list[str]:
    lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("timesformer_model_info{")]
    return [line.split('device="')[1].split('"')[0] for line in found]


def test_equal_gpus_share_a_plan_and_both_work_at_once_behind_one_queue(
    serve: Serve,
    store: BundleStore,
    gpus: Gpus,
    built: list[BuildJob],
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = gpus("A", "A")
    meeting = threading.Barrier(2)
    real = OnnxRuntime.run
    with serve(store=store.root, spool_dir=tmp_path) as client, ThreadPoolExecutor(2) as pool:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        assert devices(client) == {"cuda:0": True, "cuda:1": True}
        assert infos(client) == ["cuda:0", "cuda:1"]

        def run(engine: OnnxRuntime, frames: Any) -> Any:
            meeting.wait(30)  # nobody gets past it unless two engines are at work
            return real(engine, frames)

        monkeypatch.setattr(OnnxRuntime, "run", run)
        before = [gpu.ran for gpu in both]
        labels = list(pool.map(lambda _: label(client, video), range(2)))
        assert labels[0] == labels[1]
        assert [gpu.ran - ran for gpu, ran in zip(both, before, strict=True)] == [1, 1]
        monkeypatch.setattr(OnnxRuntime, "run", real)
        for index in range(2):
            name = f'timesformer_batches_running{{device="cuda:{index}",engine="{index}"'
            assert f'{name},model="demo"}} 0.0' in client.get("/metrics").text
        assert metric(client, 'timesformer_engines_healthy{model="demo"}') == 2
    assert [job.gpu_index for job in built] == [0]
    assert [gpu.closed for gpu in both] == [len(gpu.loaded) for gpu in both] == [1, 1]
    assert both[0].loaded == both[1].loaded


def test_different_gpus_get_a_plan_each_built_on_their_own(
    serve: Serve, store: BundleStore, gpus: Gpus, built: list[BuildJob], tmp_path: Path
) -> None:
    found = gpus("A", "B", "A")
    build_ahead(found[1], store.open("demo"))  # one that is there is no reason not to build others
    with serve(store=store.root, spool_dir=tmp_path) as client:
        wait_until(lambda: state(client) == ("tensorrt", "serving"))
        assert list(devices(client)) == ["cuda:0", "cuda:1", "cuda:2"]
    assert [(job.gpu_index, job.key.gpu) for job in built] == [(0, "A")]
    assert found[0].loaded == found[2].loaded != found[1].loaded


def test_a_swap_loads_all_beside_the_old_ones_and_frees_all_of_these(
    serve: Serve, store: BundleStore, gpus: Gpus, built: list[BuildJob], tmp_path: Path
) -> None:
    both = gpus("A", "A")
    for version in ("1", "2"):
        build_ahead(both[0], store.open("demo", version))
    with serve(store=store.root, watch_interval_s=0.05, spool_dir=tmp_path) as client:
        assert [(len(gpu.loaded), gpu.closed) for gpu in both] == [(1, 0), (1, 0)]
        store.activate("demo", "2")
        wait_until(lambda: serving(client) == "2")
        wait_until(lambda: [gpu.closed for gpu in both] == [1, 1])
        assert [len(gpu.loaded) for gpu in both] == [2, 2]
        assert infos(client) == ["cuda:0", "cuda:1"]
    assert [gpu.closed for gpu in both] == [2, 2]
    assert not built


def test_a_plan_that_one_gpu_cannot_load_serves_on_none_and_is_told(
    serve: Serve, store: BundleStore, gpus: Gpus, built: list[BuildJob], tmp_path: Path
) -> None:
    both = gpus("A", "A")
    build_ahead(both[0], store.open("demo"))
    both[1].refuses["float32"] = RuntimeUnavailableError("out of memory")
    with serve(store=store.root, spool_dir=tmp_path) as client:
        assert state(client) == ("onnxruntime", "failed: out of memory")
    assert (len(both[0].loaded), both[0].closed) == (1, 1)


def test_gpus_that_would_answer_in_different_precisions_are_an_error(
    store: BundleStore, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = gpus("A", "B")
    bundle = store.open("demo")
    files = {**bundle.manifest.files, GPU_GRAPHS["fp16"]: bundle.manifest.files[ONNX_FLOAT32]}
    richer = store.open("demo")
    richer.manifest = bundle.manifest.model_copy(update={"files": files})
    real = FakeGpu.wanted

    def wanted(gpu: FakeGpu, bundle: Bundle, *rest: Any) -> Any:
        return real(gpu, richer if gpu.name == "B" else bundle, *rest)

    monkeypatch.setattr(FakeGpu, "wanted", wanted)
    engines = Engines(both, LARGEST, "auto")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="float32 and fp16: set TIMESFORMER_PRECISION"):
        engines.find(bundle)


class TestOnnxRuntime:
    """With a CUDA provider that is made up: each GPU is the CPU, but for those that are broken."""

    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
        return install_cuda(monkeypatch)

    @pytest.mark.parametrize(
        ("named", "taken"), [("0", [0]), ("2,0", [2, 0]), (" 1 ", [1]), ("all", [0, 1, 2])]
    )
    def test_each_gpu_that_is_named_gets_an_engine(
        self, broken: dict[int, str], store: BundleStore, named: str, taken: list[int]
    ) -> None:
        settings = load_settings(store=store.root, gpu=named, max_batch_clips=1)
        model = load_model(store.open("demo"), settings)
        assert [runtime.gpu for runtime in model.runtimes] == taken
        model.close()

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    @pytest.mark.parametrize("gone", [0, 1])
    def test_one_that_cannot_be_used_beside_one_that_can_is_an_error_at_start(
        self,
        broken: dict[int, str],
        store: BundleStore,
        device: str,
        gone: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        closed: list[OnnxRuntime] = []
        monkeypatch.setattr(OnnxRuntime, "close", lambda self: closed.append(self))
        broken[gone] = f"device {gone} fell off the bus"
        settings = load_settings(store=store.root, gpu="0,1", device=device, tensorrt="off")
        with pytest.raises(RuntimeUnavailableError, match=f"GPU {gone} cannot be used, and others"):
            asyncio.run(Models(settings, Metrics()).start())
        assert [runtime.gpu for runtime in closed] == [1 - gone]

    def test_where_none_can_be_used_auto_warns_and_takes_the_cpu_and_cuda_refuses(
        self, broken: dict[int, str], store: BundleStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken.update({0: "device 0 fell off the bus", 1: "device 1 fell off the bus"})
        facts = {"store": store.root, "gpu": "0,1", "max_batch_clips": 1}
        model = load_model(store.open("demo"), load_settings(**facts))
        assert [(runtime.device, runtime.gpu) for runtime in model.runtimes] == [("cpu", None)]
        assert "no GPU is used: device 0 fell off the bus" in caplog.text
        model.close()
        with pytest.raises(RuntimeUnavailableError, match="device 0 fell off"):
            load_model(store.open("demo"), load_settings(**facts, device="cuda"))


class TestWhichGpus:
    def test_one_that_is_not_there_is_an_error_that_names_the_variable(
        self, store: BundleStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.registry.tensorrt_plans.count_gpus", lambda: 2)
        settings = load_settings(store=store.root, gpu="0,2")
        problem = "TIMESFORMER_GPU: there is no GPU 2; 2 can be seen, from 0 on"
        for find in (find_gpus, find_tensorrt):
            with pytest.raises(RuntimeUnavailableError, match=problem):
                find(settings)
        with pytest.raises(RuntimeUnavailableError, match=problem):
            asyncio.run(Models(settings, Metrics()).start())

    def test_all_of_none_is_an_error_where_a_gpu_must_be_used(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def count() -> int:
            raise RuntimeUnavailableError("there is no NVIDIA driver")

        monkeypatch.setattr("service.registry.tensorrt_plans.count_gpus", count)
        with pytest.raises(RuntimeUnavailableError, match="GPU=all: there is no NVIDIA driver"):
            find_gpus(load_settings(gpu="all", device="cuda"))
        assert find_gpus(load_settings(gpu="all")) == (0,)
        assert "GPUs cannot be counted, one is taken: there is no NVIDIA driver" in caplog.text
        assert find_gpus(load_settings(gpu="1,0", device="cuda")) == (1, 0)

    def test_tensorrt_is_on_all_of_them_or_on_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def tensorrt(index: int, engines: Path | None) -> int:
            if index == 1:
                raise RuntimeUnavailableError("GPU 1 is too old")
            return index

        monkeypatch.setattr("service.registry.tensorrt_plans.count_gpus", lambda: 3)
        monkeypatch.setattr("service.registry.tensorrt_plans.TensorRt", tensorrt)
        assert find_tensorrt(load_settings(gpu="2,0")) == ((2, 0), BUILDING)
        found, why = find_tensorrt(load_settings(gpu="all"))
        assert (found, str(why)) == ((), "unavailable: GPU 1 is too old")

    def test_on_the_cpu_no_gpu_is_looked_for(
        self, store: BundleStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(
            "service.registry.tensorrt_plans.count_gpus", lambda: pytest.fail("it was")
        )
        settings = load_settings(store=store.root, gpu="7", device="cpu", max_batch_clips=1)
        assert find_tensorrt(settings)[0] == ()
        with caplog.at_level(logging.WARNING):
            model = load_model(store.open("demo"), settings)
        assert [runtime.gpu for runtime in model.runtimes] == [None]
        assert not caplog.records
        model.close()
