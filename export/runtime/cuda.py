"""The few CUDA calls that the TensorRT runtime makes, each checked; by `cuda-bindings`, no torch.

One object is one device. Tests put another object of the same methods in its place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import Gpu


class CudaError(RuntimeError):
    """A CUDA call failed."""


def count_gpus() -> int:
    """How many GPUs can be seen, one at least.

    Raises:
        RuntimeUnavailableError: none, no driver, or `cuda-bindings` is not installed.
    """
    runtime = _bindings()
    # Without a driver TensorRT's runtime may crash the process: asked for here, first of all.
    try:
        (driver,) = _called(runtime, "cudaDriverGetVersion")
        count = int(_called(runtime, "cudaGetDeviceCount")[0]) if driver else 0
    except CudaError as error:
        raise RuntimeUnavailableError(f"no GPU can be used: {error}") from error
    if not driver:
        raise RuntimeUnavailableError("there is no NVIDIA driver")
    if not count:
        raise RuntimeUnavailableError("no GPU can be seen")
    return count


def _bindings() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"cuda-bindings cannot be imported ({error}): install the `gpu` extra"
        ) from error
    return runtime


def _called(runtime: Any, name: str, *arguments: Any) -> list[Any]:
    """What a call gives; its first value, the error, is raised."""
    values: list[Any]
    error, *values = getattr(runtime, name)(*arguments)
    if int(error):
        _, text = runtime.cudaGetErrorString(error)
        raise CudaError(f"{name}: {text.decode() if isinstance(text, bytes) else text}")
    return values


class Cuda:
    """A device: its memory, streams, events and graphs, all as addresses or opaque handles.

    Args:
        index: which of the visible GPUs.

    Raises:
        RuntimeUnavailableError: no driver, no such GPU, one that fails, or `cuda-bindings` is not
            installed.
    """

    def __init__(self, index: int = 0) -> None:
        count = count_gpus()
        if index >= count:
            raise RuntimeUnavailableError(f"there is no GPU {index}: {count} can be seen")
        self._cuda = _bindings()
        self.index = index
        try:
            self.use()
        except CudaError as error:
            raise RuntimeUnavailableError(f"GPU {index} cannot be used: {error}") from error

    @property
    def gpu(self) -> Gpu:
        facts = self._call("cudaGetDeviceProperties", self.index)
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        return Gpu(name.strip("\0 "), f"{facts.major}.{facts.minor}")

    def use(self) -> None:
        """Makes this the device of the calling thread."""
        self._call("cudaSetDevice", self.index)

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of the device's memory."""
        return int(self._call("cudaMalloc", size))

    def free_bytes(self) -> int:
        """Memory of the device that nobody has taken."""
        free, _ = self._call_for_all("cudaMemGetInfo")
        return int(free)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array in memory that the device copies from and to without the CPU."""
        import ctypes

        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))
        block = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(block, dtype).reshape(shape)

    def free_pinned(self, array: NDArray[Any]) -> None:
        """Frees what `pinned` gave; no view of it may be used any more."""
        self._call("cudaFreeHost", array.ctypes.data)

    def stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def synchronize(self, stream: int) -> None:
        """Waits for all that the stream was given."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def event(self) -> int:
        return int(self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming))

    def record(self, event: int, stream: int) -> None:
        """Marks what the stream was given so far."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """What the stream is given from here on starts after the event's last mark."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def to_device(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Copies a contiguous pinned array; it may be changed once the stream is through."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def to_host(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Fills a contiguous pinned array; it may be read once the stream is through."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def begin_capture(self, stream: int) -> None:
        """What this thread gives the stream from here on is recorded, not run."""
        # Of this thread only: others go on allocating and serving meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        """The recorded work, ready to be launched again and again."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        values = self._call_for_all(name, *arguments)
        return values[0] if values else None

    def _call_for_all(self, name: str, *arguments: Any) -> list[Any]:
        return _called(self._cuda, name, *arguments)
