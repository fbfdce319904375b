"""A device that is as late as a real one may be, and a TensorRT that runs on it.

What a stream is given runs only when somebody waits for it, and as far as order allows the streams
take turns, operation by operation. So a copy that is read too early, a buffer that is changed too
soon and work that shares memory without waiting give wrong answers here, and not on a lucky day
right ones. Misuse (freed memory, a stream in capture that is waited for, a thread that is on no
device or on another one, a handle of another device) is an error, and what is left at the end can
be asked for.

The network is that of `write_colour_graph`: logits are the means of red, green and blue over 64.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from export.runtime.cuda import CudaError
from export.runtime.plans import Gpu

POISON = 0xAB


class MisuseError(AssertionError):
    """A call that a real device would answer with an error, a crash or garbage."""


def fake_gpus(count: int) -> tuple[FakeCuda, ...]:
    """The GPUs of one machine, of which a thread is on one at a time."""
    threads = threading.local()
    return tuple(FakeCuda(index=index, threads=threads) for index in range(count))


class FakeCuda:
    """The methods of `Cuda`."""

    def __init__(
        self, fail: str = "", *, index: int = 0, threads: threading.local | None = None
    ) -> None:
        self.index = index
        self.gpu = Gpu("Fake GPU", "9.0")
        self.fail = fail
        self.launches = 0
        self.most_streams_at_once = 0
        self.before_synchronize: Callable[[], None] = lambda: None
        self._memory: dict[int, np.ndarray] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._streams: dict[int, deque[Any]] = {}
        self._events: dict[int, object] = {}
        self._graphs: dict[int, list[Any]] = {}
        self._capturing: dict[int, list[Any]] = {}
        self._done: set[object] = set()
        # No handle of one device is one of another.
        self._handles = itertools.count(1000 + 1_000_000 * index)
        self._lock = threading.RLock()
        self._thread = threads or threading.local()

    def leaks(self) -> list[str]:
        kinds = ("_memory", "_pinned", "_streams", "_events", "_graphs")
        return [f"{kind[1:]} {handle}" for kind in kinds for handle in getattr(self, kind)]

    def use(self) -> None:
        self._thread.device = self.index

    def called(self, name: str) -> None:
        """Every call begins here."""
        device = getattr(self._thread, "device", None)
        if device is None:
            raise MisuseError(f"{name} by a thread that has chosen no device")
        if device != self.index:
            raise MisuseError(f"{name} on GPU {self.index} by a thread that is on GPU {device}")
        if self.fail == name:
            raise CudaError(f"{name}: out of luck")

    def allocate(self, size: int) -> int:
        self.called("allocate")
        address = next(self._handles)
        self._memory[address] = np.full(size, POISON, np.uint8)
        return address

    def free(self, address: int) -> None:
        self.called("free")
        self._take(self._memory, address, "memory")

    def memory(self, address: int) -> np.ndarray:
        self._check(self._memory, address, "memory")
        return self._memory[address]

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.called("pinned")
        array = np.zeros(shape, dtype)
        array.view(np.uint8)[:] = POISON
        self._pinned[array.ctypes.data] = array
        return array

    def free_pinned(self, array: np.ndarray) -> None:
        self.called("free_pinned")
        self._take(self._pinned, array.ctypes.data, "pinned memory").view(np.uint8)[:] = POISON

    def stream(self) -> int:
        self.called("stream")
        handle = next(self._handles)
        self._streams[handle] = deque()
        return handle

    def destroy_stream(self, stream: int) -> None:
        self.called("destroy_stream")
        if self._take(self._streams, stream, "stream"):
            raise MisuseError("a stream is destroyed with work in it")

    def event(self) -> int:
        self.called("event")
        handle = next(self._handles)
        self._events[handle] = None
        return handle

    def destroy_event(self, event: int) -> None:
        self.called("destroy_event")
        self._take(self._events, event, "event")

    def record(self, event: int, stream: int) -> None:
        self.called("record")
        self._check(self._events, event, "event")
        with self._lock:
            mark = self._events[event] = object()
            self.give(stream, lambda: self._done.add(mark))

    def wait(self, stream: int, event: int) -> None:
        self.called("wait")
        self._check(self._events, event, "event")
        with self._lock:
            if (mark := self._events[event]) is not None:
                self.give(stream, mark)

    def to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        self.called("to_device")
        self._check_pinned(array)

        def copy() -> None:
            self.memory(address)[: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

        self.give(stream, copy)

    def to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        self.called("to_host")
        self._check_pinned(array)

        def copy() -> None:
            found = self.memory(address)[: array.nbytes]
            array[...] = found.view(array.dtype).reshape(array.shape)

        self.give(stream, copy)

    def begin_capture(self, stream: int) -> None:
        self.called("begin_capture")
        self._check(self._streams, stream, "stream")
        if self._streams[stream]:
            raise MisuseError("a capture begins on a stream that has work in it")
        self._capturing[stream] = []

    def end_capture(self, stream: int) -> int:
        self.called("end_capture")
        handle = next(self._handles)
        self._graphs[handle] = self._capturing.pop(stream)
        return handle

    def capturing(self, stream: int) -> bool:
        return stream in self._capturing

    def launch(self, graph: int, stream: int) -> None:
        self.called("launch")
        self._check(self._graphs, graph, "graph")
        self.launches += 1
        for operation in self._graphs[graph]:
            self.give(stream, operation)

    def destroy_graph(self, graph: int) -> None:
        self.called("destroy_graph")
        self._take(self._graphs, graph, "graph")

    def give(self, stream: int, operation: Any) -> None:
        self._check(self._streams, stream, "stream")
        with self._lock:
            self._capturing.get(stream, self._streams[stream]).append(operation)

    def synchronize(self, stream: int) -> None:
        self.called("synchronize")
        self._check(self._streams, stream, "stream")
        if stream in self._capturing:
            raise MisuseError("a stream is waited for while it is captured")
        self.before_synchronize()
        with self._lock:
            busy = sum(bool(work) for work in self._streams.values())
            self.most_streams_at_once = max(self.most_streams_at_once, busy)
            while self._streams[stream]:
                moved = [self._step(work) for work in self._streams.values()]
                if not any(moved):
                    raise MisuseError("the streams wait for each other")

    def _step(self, work: deque[Any]) -> bool:
        """One operation of a stream; False if it has none or must wait."""
        if not work:
            return False
        if callable(work[0]):
            work.popleft()()
            return True
        if work[0] in self._done:
            work.popleft()
            return True
        return False

    def _check(self, held: dict[int, Any], handle: int, what: str) -> None:
        if handle not in held:
            raise MisuseError(f"{what} {handle} is used and was freed, or is not of this device")

    def _take(self, held: dict[int, Any], handle: int, what: str) -> Any:
        if handle not in held:
            raise MisuseError(f"{what} {handle} is freed twice, or never was")
        return held.pop(handle)

    def _check_pinned(self, array: np.ndarray) -> None:
        if not array.flags.c_contiguous or array.ctypes.data not in self._pinned:
            raise MisuseError("a copy from or to memory that is not pinned, or not in one piece")


class _Context:
    def __init__(self, cuda: FakeCuda, log: Any, most: tuple[int, ...]) -> None:
        cuda.called("create_execution_context")
        self._cuda, self._log, self._most = cuda, log, most
        self._addresses: dict[str, int] = {}
        self._profile: int | None = None
        self._scratch: int | None = None
        self._shape: tuple[int, ...] = ()
        self._ran: tuple[int, ...] = ()

    def set_device_memory(self, address: int, size: int) -> None:
        self._scratch = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        self._cuda.give(stream, lambda: None)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least = (0, *self._most)[self._profile] + 1
        if not least <= shape[0] <= self._most[self._profile]:
            return self._no(f"batch {shape[0]} is not of profile {self._profile}")
        self._shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self._cuda.called("execute_async_v3")
        if not self._shape or self._scratch is None or len(self._addresses) != 3:
            return self._no("shape, memory or an address is missing")
        if self._cuda.capturing(stream) and self._ran != self._shape:
            return self._no("a shape is captured that never ran")
        self._ran = self._shape
        shape, scratch, at = self._shape, self._scratch, dict(self._addresses)
        memory, batch = self._cuda.memory, self._shape[0]

        def begin() -> None:
            frames = memory(at["frames"])[: np.prod(shape)].reshape(shape)
            means = frames.mean(axis=(1, 2, 3)).astype(np.float32)
            memory(scratch)[: means.nbytes] = means.view(np.uint8).ravel()

        def end() -> None:
            logits = memory(scratch)[: batch * 12].view(np.float32).reshape(batch, 3) / 64
            embedding = np.repeat(logits.sum(axis=1, keepdims=True), 16, axis=1)
            for name, values in (("logits", logits), ("embedding", embedding)):
                memory(at[name])[: values.nbytes] = values.view(np.uint8).ravel()

        self._cuda.give(stream, begin)
        self._cuda.give(stream, end)
        return True

    def _no(self, why: str) -> bool:
        self._log.log(self._log.ERROR, why)
        return False


def fake_tensorrt(cuda: FakeCuda, most: tuple[int, ...], loads: bool = True) -> Any:
    """A TensorRT module whose every plan is the colour network, with profiles up to `most`."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            cuda.called("deserialize_cuda_engine")
            if not loads:
                self._log.log(ILogger.ERROR, "the plan is of another version")
                return None
            shapes = {"frames": (-1, 4, 16, 16, 3), "logits": (-1, 3), "embedding": (-1, 16)}
            types = {"frames": "uint8", "logits": "float", "embedding": "float"}
            return SimpleNamespace(
                num_optimization_profiles=len(most),
                get_device_memory_size_for_profile_v2=lambda index: most[index] * 12,
                get_tensor_dtype=types.get,
                get_tensor_shape=shapes.get,
                create_execution_context=lambda strategy: _Context(cuda, self._log, most),
            )

    class Module(SimpleNamespace):
        __hash__ = object.__hash__

    return Module(
        __version__="11.4.0.106",
        ILogger=ILogger,
        Runtime=Runtime,
        DataType=SimpleNamespace(UINT8="uint8", FLOAT="float"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
    )
