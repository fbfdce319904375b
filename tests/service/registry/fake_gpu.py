"""A GPU with TensorRT that is made up: its plans are files of a few bytes, and its engines are ONNX
Runtime on the CPU under another name. All around it is real."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle.bundle import Bundle, BundleStore
from export.bundle.manifest import ONNX_FLOAT32
from export.runtime.interface import Outputs, RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import (
    Plan,
    PlanError,
    PlanKey,
    engines_folder,
    find_plan,
    graph_of,
)
from export.runtime.tensorrt import Wanted
from export.tensorrt.builder import BuildJob
from service.registry.tensorrt_plans import BUILDING
from tests.export.conftest import plan_facts


class FakeGpu:
    """Replaces `TensorRt`; an engine that it loads computes a float32 graph."""

    def __init__(self, graph: Path, *, index: int = 0, name: str = "Fake") -> None:
        self.cuda = SimpleNamespace(index=index)
        self.graph, self.name = graph, name
        self.refuses: dict[str, Exception] = {}
        """Precisions of plans that cannot be loaded."""
        self.wrong: set[str] = set()
        """Precisions of plans with wrong answers."""
        self.ran = 0
        self.loaded: list[Path] = []
        self.closed = 0

    def wanted(self, bundle: Bundle, precision: str, batches: tuple[int, ...]) -> Wanted:
        found, graph, sha256 = graph_of(bundle, precision, "9.0")
        facts = {"gpu": self.name, "compute_capability": "9.0", "tensorrt": "11"}
        key = PlanKey(**facts, precision=found, batches=batches)
        return Wanted(key, graph, sha256, engines_folder(bundle))

    def load(self, plan: Plan, largest: int) -> Any:
        precision = plan.facts.key.precision
        if precision in self.refuses:
            raise self.refuses[precision]
        self.loaded.append(plan.path)
        session = OnnxRuntime(self.graph, cuda=False, threads=1)
        factor = np.float32(-1 if precision in self.wrong else 1)

        def run(frames: np.ndarray) -> Outputs:
            self.ran += 1
            logits, embedding = session.run(frames)
            return Outputs(logits * factor, embedding)

        def close() -> None:
            self.closed += 1
            session.close()

        facts = {"engine": "tensorrt", "provider": "TensorRT 11", "device": "cuda"}
        shape = {"gpu": self.cuda.index, "slots": 2, "batches": (1, 8, 16)}
        return SimpleNamespace(**facts, **shape, precision=precision, run=run, close=close)


def install_gpus(
    monkeypatch: pytest.MonkeyPatch, store: BundleStore, *kinds: str
) -> tuple[FakeGpu, ...]:
    """Lets the service find a GPU of each of these kinds."""
    graph = store.open("demo").file(ONNX_FLOAT32)
    gpus = tuple(FakeGpu(graph, index=index, name=kind) for index, kind in enumerate(kinds))
    for module in ("service.registry.models", "service.offline.local_runner"):
        monkeypatch.setattr(f"{module}.find_tensorrt", lambda settings: (gpus, BUILDING))
    return gpus


class FakeBuilder:
    """Replaces the builder's child process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[BuildJob] = []
        self.fails: dict[str, str] = {}
        """Versions whose plans cannot be built, and why."""
        self.facts: dict[str, Any] = {}
        """Facts of the plans that are built."""
        self.go_on = threading.Event()
        self.go_on.set()
        monkeypatch.setattr("service.registry.tensorrt_plans.build_plan", self._build)

    @property
    def versions(self) -> list[str]:
        """The versions whose plans were begun."""
        return [job.graph.parent.name for job in self.jobs]

    def _build(self, job: BuildJob, progress: Any, on_start: Any) -> Plan:
        self.jobs.append(job)
        assert self.go_on.wait(60)
        if reason := self.fails.get(job.graph.parent.name):
            raise PlanError(reason)
        return write_plan(job, **self.facts)


def write_plan(job: BuildJob, **told: Any) -> Plan:
    """Writes a plan of that job; `told` are facts of it."""
    job.folder.mkdir(exist_ok=True)
    job.plan.write_bytes(b"a plan")
    facts = plan_facts(job.key, job.graph_sha256).model_copy(update=told)
    job.plan.with_suffix(".json").write_text(facts.model_dump_json())
    found = find_plan(job.folder, job.key, job.graph_sha256)
    assert found is not None
    return found


def build_ahead(gpu: FakeGpu, bundle: Bundle, precision: str = "float32") -> None:
    """Writes the plan as `engines build` does before the service starts."""
    write_plan(BuildJob.of(gpu.wanted(bundle, precision, (1, 8, 32))))


def install_cuda(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Gives ONNX Runtime a CUDA provider whose GPUs are the CPU; returns those that are broken:
    the reason for each."""
    broken: dict[int, str] = {}
    real = OnnxRuntime.__init__

    def load(self: OnnxRuntime, model: Path, *, cuda: bool, gpu: int = 0, **rest: Any) -> None:
        if cuda and gpu in broken:
            raise RuntimeUnavailableError(broken[gpu])
        real(self, model, cuda=False, **rest)
        if cuda:
            self.device, self.gpu = "cuda", gpu

    monkeypatch.setattr(OnnxRuntime, "__init__", load)
    monkeypatch.setattr("service.registry.tensorrt_plans.count_gpus", lambda: 3)
    return broken


def state(client: httpx.Client) -> tuple[str, str]:
    """Which engine serves, and TensorRT's status."""
    ready = client.get("/health/ready").json()
    return ready["engine"], ready["tensorrt"]


def label(client: httpx.Client, video: Path) -> str:
    answer = client.post("/v1/classify", content=video.read_bytes())
    assert answer.status_code == 200
    return str(answer.json()["predictions"][0]["label"])
