"""TensorRT: plans executed by TensorRT's own runtime and CUDA graphs, without torch.

Two batches may be on their way at once, each in a slot with buffers and a stream of its own: one is
copied while the other is computed. Computing is one after the other, by an event, since all share
the memory of the activations.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import queue
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle.bundle import Bundle
from export.runtime.cuda import Cuda, CudaError
from export.runtime.interface import Outputs, RuntimeUnavailableError
from export.runtime.plans import (
    BATCHES,
    Plan,
    PlanError,
    PlanKey,
    engines_folder,
    graph_of,
    measured_order,
    profiles,
    read_plan,
)

logger = logging.getLogger(__name__)

INPUT = "frames"
OUTPUTS = ("logits", "embedding")
SLOTS = 2
_KEPT = 20


def load_tensorrt(name: str = "tensorrt") -> ModuleType:
    """The TensorRT module.

    Raises:
        RuntimeUnavailableError: it is not installed, or its libraries are not.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"TensorRT cannot be imported ({error}): install the `gpu` extra on a GPU node"
        ) from error


class Wanted(NamedTuple):
    """The plan that a bundle needs here."""

    key: PlanKey
    graph: Path
    graph_sha256: str
    folder: Path


class TensorRt:
    """TensorRT on one GPU of this machine: says which plan a bundle needs, and loads it.

    Args:
        index: which of the visible GPUs.
        engines: folder of plans; by default each bundle's own.

    Raises:
        RuntimeUnavailableError: there is no usable GPU, or no TensorRT.
    """

    def __init__(self, index: int = 0, engines: Path | None = None) -> None:
        self.cuda = Cuda(index)
        self.module = load_tensorrt()
        self.engines = engines

    def wanted(
        self,
        bundle: Bundle,
        precision: str = "auto",
        batches: tuple[int, ...] = BATCHES,
    ) -> Wanted:
        """Key and place of the plan of a bundle.

        Raises:
            PlanError: the bundle has no graph of that precision, or the GPU lacks it.
        """
        gpu = self.cuda.gpu
        folder = engines_folder(bundle, self.engines)
        key = PlanKey(
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
            tensorrt=str(self.module.__version__),
            precision=precision,
            batches=batches,
        )
        measured = measured_order(folder, key, bundle) if precision == "auto" else ()
        found, graph, sha256 = graph_of(bundle, precision, gpu.compute_capability, measured)
        return Wanted(key.model_copy(update={"precision": found}), graph, sha256, folder)

    def load(self, plan: Plan, largest: int) -> TensorRtRuntime:
        """Loads a plan for batches of up to `largest`.

        Raises:
            RuntimeUnavailableError: it cannot be loaded or run here.
        """
        return TensorRtRuntime(plan, self.cuda, largest, self.module)


@functools.cache  # TensorRT keeps to the first one that a process gives it
def log_of(trt: ModuleType) -> Any:
    """The process's `trt.ILogger`, which passes records on to `logging` and remembers what went
    wrong: TensorRT says it nowhere else.

    Its `warnings` and `errors` are the different ones since `forget()`, in their order, `why()` is
    the errors as one sentence, and `half_norms` says whether a LayerNorm in FP16 was found.
    """
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
    }

    class Log(trt.ILogger):  # type: ignore[name-defined,misc] # imported at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.forget()

        def forget(self) -> None:
            self.warnings: list[str] = []
            self.errors: list[str] = []
            self.half_norms = False

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            text = " ".join(msg.split())
            logger.log(level, text)
            if level < logging.WARNING:
                return
            if "layernorm" in text.lower() and "fp16" in text.lower():
                self.half_norms = True
            kept = self.errors if level == logging.ERROR else self.warnings
            if text not in kept and len(kept) < _KEPT:
                kept.append(text)

        def why(self) -> str:
            return "; ".join(self.errors) or "TensorRT gave no reason"

    return Log()


def made(make: Any, log: Any, *arguments: Any) -> Any:
    """What a TensorRT factory gives; it says that it failed by None or by a TypeError.

    Raises:
        PlanError: it failed. Most often the driver is older than the libraries.
    """
    try:
        found = make(*arguments)
    except (TypeError, RuntimeError) as error:
        raise PlanError(f"TensorRT could not start: {log.why()} ({error})") from error
    if found is None:
        raise PlanError(f"TensorRT could not start: {log.why()}")
    return found


class _Slot(NamedTuple):
    """Where one batch is, here and on the device, and the stream that moves it."""

    stream: int
    frames: NDArray[np.uint8]
    """Pinned, (largest batch, time, height, width, 3)."""
    outputs: tuple[NDArray[np.float32], ...]
    """Pinned, (largest batch, size) each, in the order of `OUTPUTS`."""
    addresses: dict[str, int]
    graphs: dict[int, Any]
    """The captured work of each batch size."""


class TensorRtRuntime:
    """A plan on one GPU. `run` may be called from several threads.

    Args:
        plan: fits this GPU and this TensorRT, see `find_plan`.
        cuda: the device.
        largest: batch sizes up to this one are captured now; larger batches run in parts.
        trt: the TensorRT module.

    Raises:
        RuntimeUnavailableError: the plan cannot be loaded or run here; nothing stays on the device.
    """

    engine = "tensorrt"
    device = "cuda"
    slots = SLOTS

    def __init__(self, plan: Plan, cuda: Cuda, largest: int, trt: ModuleType) -> None:
        self.precision = plan.facts.key.precision
        self.provider = f"TensorRT {plan.facts.key.tensorrt}"
        self.gpu = cuda.index
        self._cuda = cuda
        self._trt = trt
        self._log = log_of(trt)
        self._batches = profiles(plan.facts.key.batches)
        self._largest = min(largest, plan.facts.key.batches[-1])
        tuned = (size for size in plan.facts.key.batches if size < self._largest)
        self.batches = (*tuned, self._largest)
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._launching = threading.Lock()
        self._held = contextlib.ExitStack()  # frees in the opposite order
        try:
            self._load(plan)
        except (CudaError, PlanError) as error:
            self.close()
            raise RuntimeUnavailableError(f"{plan.path.name} cannot run: {error}") from error
        except BaseException:
            self.close()
            raise

    def _load(self, plan: Plan) -> None:
        content = read_plan(plan)
        self._cuda.use()
        self._log.forget()
        runtime = made(self._trt.Runtime, self._log, self._log)
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise PlanError(self._log.why())
        if engine.num_optimization_profiles != len(self._batches):
            raise PlanError(f"it has {engine.num_optimization_profiles} profiles")
        computed = self._cuda.event()
        self._held.callback(self._cuda.destroy_event, computed)
        self._computed = computed
        indices = range(len(self._batches))
        scratch = max(engine.get_device_memory_size_for_profile_v2(index) for index in indices)
        self._scratch = self._allocate(max(1, scratch)), scratch
        slots = [self._slot(engine) for _ in range(SLOTS)]
        contexts: list[Any] = []
        self._held.callback(contexts.clear)  # after their graphs, before the memory they use
        for slot in slots:
            sizes = range(1, self._largest + 1)
            contexts += [self._capture(engine, slot, batch) for batch in sizes]
        for slot in slots:
            self._free.put(slot)

    def _slot(self, engine: Any) -> _Slot:
        stream = self._cuda.stream()
        self._held.callback(self._cuda.destroy_stream, stream)
        arrays, addresses = [], {}
        for name in (INPUT, *OUTPUTS):
            wanted = self._trt.DataType.UINT8 if name == INPUT else self._trt.DataType.FLOAT
            if engine.get_tensor_dtype(name) != wanted:
                raise PlanError(f"{name} is {engine.get_tensor_dtype(name)}")
            shape = (self._largest, *tuple(engine.get_tensor_shape(name))[1:])
            array = self._cuda.pinned(shape, np.uint8 if name == INPUT else np.float32)
            self._held.callback(self._cuda.free_pinned, array)
            arrays.append(array)
            addresses[name] = self._allocate(array.nbytes)
        frames, *outputs = arrays
        return _Slot(stream, frames, tuple(outputs), addresses, {})

    def _allocate(self, size: int) -> int:
        address = self._cuda.allocate(size)
        self._held.callback(self._cuda.free, address)
        return address

    def _capture(self, engine: Any, slot: _Slot, batch: int) -> Any:
        """Records the work of one batch size; gives the context that it needs as long as it lives.

        A context of its own each: what a graph recorded of a context must not change after.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(strategy)
        if context is None:
            raise PlanError(self._log.why())
        context.set_device_memory(*self._scratch)
        index = next(i for i, (_, _, most) in enumerate(self._batches) if batch <= most)
        self._must(context.set_optimization_profile_async(index, slot.stream))
        self._cuda.synchronize(slot.stream)
        self._must(context.set_input_shape(INPUT, (batch, *slot.frames.shape[1:])))
        for name, address in slot.addresses.items():
            self._must(context.set_tensor_address(name, address))
        # Once for real: TensorRT prepares at the first run of a shape what cannot be recorded.
        self._must(context.execute_async_v3(slot.stream))
        self._cuda.synchronize(slot.stream)
        self._cuda.begin_capture(slot.stream)
        try:
            recorded = context.execute_async_v3(slot.stream)
        finally:
            graph = self._cuda.end_capture(slot.stream)
            self._held.callback(self._cuda.destroy_graph, graph)
        self._must(recorded)
        slot.graphs[batch] = graph
        return context

    def _must(self, done: bool) -> None:
        """TensorRT's calls say False, and why in the log."""
        if not done:
            raise PlanError(self._log.why())

    def run(self, frames: NDArray[np.uint8]) -> Outputs:
        if len(frames) > self._largest:
            pieces = range(0, len(frames), self._largest)
            parts = [self.run(frames[start : start + self._largest]) for start in pieces]
            logits, embedding = (np.concatenate(part) for part in zip(*parts, strict=True))
            return Outputs(logits, embedding)
        self._cuda.use()
        slot = self._free.get()
        try:
            return self._run(slot, frames)
        finally:
            self._free.put(slot)

    def _run(self, slot: _Slot, frames: NDArray[np.uint8]) -> Outputs:
        batch = len(frames)
        slot.frames[:batch] = frames
        try:
            self._cuda.to_device(slot.addresses[INPUT], slot.frames[:batch], slot.stream)
            with self._launching:  # so that each waits for the one before, and for no other
                self._cuda.wait(slot.stream, self._computed)
                self._cuda.launch(slot.graphs[batch], slot.stream)
                self._cuda.record(self._computed, slot.stream)
            for name, array in zip(OUTPUTS, slot.outputs, strict=True):
                self._cuda.to_host(array[:batch], slot.addresses[name], slot.stream)
        finally:  # also after an error: the slot is not free while the device may read it
            self._cuda.synchronize(slot.stream)
        logits, embedding = (array[:batch].copy() for array in slot.outputs)
        return Outputs(logits, embedding)

    def close(self) -> None:
        """Frees the device's memory; no `run` may be on its way."""
        with contextlib.suppress(CudaError):  # a device that is lost has nothing to free
            self._cuda.use()
            self._held.close()
