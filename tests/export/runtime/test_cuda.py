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

    def __init__(self, device: FakeCuda, driver: int = 13000, gpus: int = 2) -> None:
        self.device, self.driver, self.gpus = device, driver, gpus
        self.chosen: list[int] = []
        self.recorded: set[int] = set()
        """Captures that are not destroyed yet."""
        self._pinned: dict[int, np.ndarray] = {}

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                given = getattr(self, f"_{name}")(*arguments)
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

    def _cudaDriverGetVersion(self) -> int:
        return self.driver

    def _cudaGetDeviceProperties(self, index: int) -> Any:
        return SimpleNamespace(name=b"Fake GPU\0\0", major=9, minor=index)

    def _cudaSetDevice(self, index: int) -> None:
        self.chosen.append(index)
        self.device.use()

    def _cudaMalloc(self, size: int) -> int:
        return self.device.allocate(size)

    def _cudaFree(self, address: int) -> None:
        self.device.free(address)

    def _cudaHostAlloc(self, size: int, flags: int) -> int:
        array = self.device.pinned((size,), np.uint8)
        self._pinned[array.ctypes.data] = array
        return int(array.ctypes.data)

    def _cudaFreeHost(self, address: int) -> None:
        self.device.free_pinned(self._pinned.pop(address))

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == self.cudaStreamNonBlocking, "the default stream would be waited for"
        return self.device.stream()

    def _cudaStreamSynchronize(self, stream: int) -> None:
        self.device.synchronize(stream)

    def _cudaStreamDestroy(self, stream: int) -> None:
        self.device.destroy_stream(stream)

    def _cudaEventCreateWithFlags(self, flags: int) -> int:
        return self.device.event()

    def _cudaEventRecord(self, event: int, stream: int) -> None:
        self.device.record(event, stream)

    def _cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        self.device.wait(stream, event)

    def _cudaEventDestroy(self, event: int) -> None:
        self.device.destroy_event(event)

    def _cudaMemcpyAsync(self, to: int, of: int, size: int, kind: Kind, stream: int) -> None:
        if kind is Kind.cudaMemcpyHostToDevice:
            self.device.to_device(to, self._pinned[of][:size], stream)
        else:
            self.device.to_host(self._pinned[to][:size], of, stream)

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert mode == 1, "others could not allocate meanwhile"
        self.device.begin_capture(stream)

    def _cudaStreamEndCapture(self, stream: int) -> int:
        graph = self.device.end_capture(stream)
        self.recorded.add(graph)
        return graph

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        assert graph in self.recorded
        return graph

    def _cudaGraphDestroy(self, graph: int) -> None:
        self.recorded.remove(graph)

    def _cudaGraphLaunch(self, graph: int, stream: int) -> None:
        self.device.launch(graph, stream)

    def _cudaGraphExecDestroy(self, graph: int) -> None:
        self.device.destroy_graph(graph)


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

    @pytest.mark.parametrize("call", ["allocate", "pinned", "stream", "event", "launch"])
    def test_a_call_that_fails_is_an_error_that_names_it(
        self, bindings: FakeBindings, plan: Plan, call: str
    ) -> None:
        device = bindings.device
        device.fail = call
        trt: Any = fake_tensorrt(device, BATCHES)
        if call == "launch":
            runtime = TensorRtRuntime(plan, Cuda(0), 6, trt)
            with pytest.raises(CudaError, match="cudaGraphLaunch: out of luck"):
                runtime.run(clips(1))
            runtime.close()
        else:
            with pytest.raises(RuntimeUnavailableError, match=r"cuda\w+: out of luck"):
                TensorRtRuntime(plan, Cuda(0), 6, trt)
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
        bindings.driver = 0
        with pytest.raises(RuntimeUnavailableError, match="there is no NVIDIA driver"):
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


def without_driver() -> Cuda | None:
    """A device of the real bindings on a machine that has none; None where it has."""
    bindings = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if bindings.cudaDriverGetVersion()[1]:
        return None
    device = Cuda.__new__(Cuda)
    device._cuda, device.index = bindings, 0
    return device


def test_the_real_bindings_take_every_call_as_we_make_it() -> None:
    """Without a driver each answers with an error of CUDA's; a name or an argument that it does not
    take would be Python's own."""
    device = without_driver()
    if device is None:
        pytest.skip("a driver is here: the tests on the GPU say more")
    made = every_call(device)
    assert made.keys() == {name for name in vars(Cuda) if not name.startswith("_")}
    for call in made.values():
        with pytest.raises(CudaError, match=r"^cuda\w+: .*driver"):
            call()


def test_the_real_bindings_say_that_there_is_no_driver() -> None:
    if without_driver() is None:
        assert count_gpus() >= 1
    else:
        with pytest.raises(RuntimeUnavailableError, match="there is no NVIDIA driver"):
            Cuda()
