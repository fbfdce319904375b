"""The CUDA calls: their names and arguments by the real bindings, which answer without a driver;
what they do together on the made-up device; what a machine without a GPU is told."""

# ruff: noqa: N802, N815

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export.runtime import cuda as calls
from export.runtime.cuda import Cuda, CudaError, count_gpus
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import Plan
from export.runtime.tensorrt import TensorRtRuntime
from tests.export.runtime.fake_cuda import FakeCuda, fake_tensorrt
from tests.export.runtime.test_tensorrt import BATCHES, check, clips, plan

__all__ = ["plan"]  # the fixture


class Status(IntEnum):
    SUCCESS = 0
    OUT_OF_LUCK = 2
    NO_DRIVER = 35


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class FakeBindings:
    """`cuda.bindings.runtime` on a `FakeCuda`: statuses and addresses, as the real one has."""

    cudaHostAllocDefault, cudaStreamNonBlocking, cudaEventDisableTiming = 0, 1, 2
    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, device: FakeCuda) -> None:
        self.device, self.driver, self.gpus = device, 13000, 2
        self.chosen: list[int] = []
        self.recorded: set[int] = set()
        """Captures that are not destroyed yet."""
        self._pinned: dict[int, np.ndarray] = {}
        self._calls: dict[str, Callable[..., Any]] = {
            "cudaDriverGetVersion": lambda: self.driver,
            "cudaGetDeviceProperties": lambda index: SimpleNamespace(
                name=b"Fake GPU\0\0", major=9, minor=index
            ),
            "cudaSetDevice": self._choose,
            "cudaMalloc": device.allocate,
            "cudaFree": device.free,
            "cudaHostAlloc": self._pin,
            "cudaFreeHost": lambda address: device.free_pinned(self._pinned.pop(address)),
            "cudaStreamCreateWithFlags": self._stream,
            "cudaStreamSynchronize": device.synchronize,
            "cudaStreamDestroy": device.destroy_stream,
            "cudaStreamBeginCapture": self._begin_capture,
            "cudaStreamEndCapture": self._end_capture,
            "cudaStreamWaitEvent": lambda stream, event, flags: device.wait(stream, event),
            "cudaEventCreateWithFlags": lambda flags: device.event(),
            "cudaEventRecord": device.record,
            "cudaEventDestroy": device.destroy_event,
            "cudaMemcpyAsync": self._copy,
            "cudaGraphInstantiate": self._instantiate,
            "cudaGraphDestroy": self.recorded.remove,
            "cudaGraphLaunch": device.launch,
            "cudaGraphExecDestroy": device.destroy_graph,
        }

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                given = self._calls[name](*arguments)
            except CudaError:
                return (Status.OUT_OF_LUCK, None)
            return (Status.SUCCESS,) if given is None else (Status.SUCCESS, given)

        if not name.startswith("cuda"):
            raise AttributeError(name)
        return call

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return (Status.SUCCESS, 3 << 30, 4 << 30)

    def cudaGetErrorString(self, error: Status) -> tuple[Any, ...]:
        return (Status.SUCCESS, error.name.lower().replace("_", " ").encode())

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (Status.SUCCESS, self.gpus) if self.driver else (Status.NO_DRIVER, None)

    def _choose(self, index: int) -> None:
        self.chosen.append(index)
        self.device.use()

    def _pin(self, size: int, flags: int) -> int:
        array = self.device.pinned((size,), np.uint8)
        self._pinned[array.ctypes.data] = array
        return int(array.ctypes.data)

    def _stream(self, flags: int) -> int:
        assert flags == self.cudaStreamNonBlocking, "the default stream would be waited for"
        return self.device.stream()

    def _copy(self, to: int, of: int, size: int, kind: Kind, stream: int) -> None:
        if kind is Kind.cudaMemcpyHostToDevice:
            self.device.to_device(to, self._pinned[of][:size], stream)
        else:
            self.device.to_host(self._pinned[to][:size], of, stream)

    def _begin_capture(self, stream: int, mode: int) -> None:
        assert mode == 1, "others could not allocate meanwhile"
        self.device.begin_capture(stream)

    def _end_capture(self, stream: int) -> int:
        graph = self.device.end_capture(stream)
        self.recorded.add(graph)
        return graph

    def _instantiate(self, graph: int, flags: int) -> int:
        assert graph in self.recorded
        return graph


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> FakeBindings:
    made = FakeBindings(FakeCuda())
    monkeypatch.setattr(calls, "_bindings", lambda: made)
    return made


class TestTogether:
    def test_a_plan_runs_through_the_calls_and_leaves_nothing(
        self, bindings: FakeBindings, plan: Plan
    ) -> None:
        """Copies by address and size, captures, launches, in the order the device asks for."""
        trt: Any = fake_tensorrt(bindings.device, BATCHES)
        runtime = TensorRtRuntime(plan, Cuda(1), 6, trt)
        assert runtime.gpu == 1
        assert set(bindings.chosen) == {1}
        for batch in (1, 3, 6, 9):
            check(runtime, clips(batch, seed=batch))
        assert bindings.device.leaks() != []
        runtime.close()
        assert bindings.device.leaks() == []
        assert bindings.recorded == set()

    def test_a_call_that_fails_is_an_error_that_names_it(
        self, bindings: FakeBindings, plan: Plan
    ) -> None:
        device = bindings.device
        trt: Any = fake_tensorrt(device, BATCHES)
        runtime = TensorRtRuntime(plan, Cuda(0), 6, trt)
        device.fail = "launch"
        with pytest.raises(CudaError, match="cudaGraphLaunch: out of luck"):
            runtime.run(clips(1))
        runtime.close()
        assert device.leaks() == []

    def test_the_device_is_described(self, bindings: FakeBindings) -> None:
        assert Cuda(1).gpu == ("Fake GPU", "9.1")
        assert Cuda(0).free_bytes() == 3 << 30


class TestWithoutAGpu:
    def test_a_driver_or_gpu_that_fails_is_named(
        self, bindings: FakeBindings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            bindings, "cudaSetDevice", lambda _: (Status.OUT_OF_LUCK,), raising=False
        )
        with pytest.raises(RuntimeUnavailableError, match="GPU 1 cannot be used: cudaSetDevice"):
            Cuda(1)
        monkeypatch.setattr(bindings, "cudaGetDeviceCount", lambda: (Status.NO_DRIVER, None))
        with pytest.raises(RuntimeUnavailableError, match="cudaGetDeviceCount: no driver"):
            count_gpus()

    def test_no_gpu_and_not_so_many(self, bindings: FakeBindings) -> None:
        assert count_gpus() == 2
        with pytest.raises(RuntimeUnavailableError, match="there is no GPU 2: 2 can be seen"):
            Cuda(2)
        bindings.gpus = 0
        with pytest.raises(RuntimeUnavailableError, match="no GPU can be seen"):
            Cuda()

    def test_no_bindings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(RuntimeUnavailableError, match="install the `gpu` extra"):
            count_gpus()


def every_call(device: Cuda) -> dict[str, Callable[[], object]]:
    """Each method of `Cuda`, with arguments as the runtime gives them."""
    array = np.zeros(4, np.float32)
    return {
        "use": device.use,
        "gpu": lambda: device.gpu,
        "allocate": lambda: device.allocate(16),
        "free_bytes": device.free_bytes,
        "free": lambda: device.free(4096),
        "pinned": lambda: device.pinned((2, 2), np.float32),
        "free_pinned": lambda: device.free_pinned(array),
        "stream": device.stream,
        "synchronize": lambda: device.synchronize(4096),
        "destroy_stream": lambda: device.destroy_stream(4096),
        "event": device.event,
        "record": lambda: device.record(4096, 4096),
        "wait": lambda: device.wait(4096, 4096),
        "destroy_event": lambda: device.destroy_event(4096),
        "to_device": lambda: device.to_device(4096, array, 4096),
        "to_host": lambda: device.to_host(array, 4096, 4096),
        "begin_capture": lambda: device.begin_capture(4096),
        "end_capture": lambda: device.end_capture(4096),
        "launch": lambda: device.launch(4096, 4096),
        "destroy_graph": lambda: device.destroy_graph(4096),
    }


def test_the_real_bindings_take_every_call_as_we_make_it() -> None:
    """Without a driver each answers with an error of CUDA's; a name or an argument that it does not
    take would be Python's own."""
    bindings = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if bindings.cudaDriverGetVersion()[1]:
        pytest.skip("a driver is here: the tests on the GPU say more")
    with pytest.raises(RuntimeUnavailableError, match="there is no NVIDIA driver"):
        Cuda()
    device = Cuda.__new__(Cuda)
    device._cuda, device.index = bindings, 0
    made = every_call(device)
    assert made.keys() == {name for name in vars(Cuda) if not name.startswith("_")}
    for call in made.values():
        with pytest.raises(CudaError, match=r"^cuda\w+: .*driver"):
            call()
