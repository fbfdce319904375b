"""ONNX Runtime and TensorRT for `tests/benchmarks/gpu.py`; needs onnx and the engines.

Each as a GPU's own work, with frames and answers that stay on the device, and as it is served, with
frames from the host and answers back.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.bundle import sha256_of
from export.fp16 import export_fp16
from export.onnx import INPUT_NAME, OUTPUT_NAMES, export_onnx
from export.products import record_magnitudes
from export.rewrite import rewrite
from export.runtime.interface import Outputs, Runtime
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import BATCHES, PlanKey
from export.runtime.tensorrt import INPUT, OUTPUTS, TensorRt, TensorRtRuntime, Wanted
from export.tensorrt import BuildJob, build_plan
from model.timesformer import TimeSformer
from tests.benchmarks.gpu_bench import Answers, Bench, Entrant
from tests.benchmarks.gpu_networks import (
    ONNX_RUNTIME,
    ONNX_RUNTIME_SERVED,
    TENSORRT,
    TENSORRT_SERVED,
)

Frames = NDArray[np.uint8]


class Engines:
    """The engines that are here, with the FP16 graph loaded.

    Args:
        largest: most clips in a batch.
    """

    def __init__(self, bench: Bench, largest: int) -> None:
        self._bench = bench
        graph = write_graph(bench.model, bench.work)
        self._onnx_runtime: OnnxRuntime | None = None
        self._tensorrt: TensorRtRuntime | None = None
        with bench.attempt(ONNX_RUNTIME):
            self._onnx_runtime = OnnxRuntime(graph, cuda=True, precision="fp16")
        with bench.attempt(TENSORRT):
            self._tensorrt = load_plan(graph, largest)
        self._missing = dict(bench.left_out)

    def entrants(self, frames: Tensor) -> dict[str, Entrant]:
        bench, there = self._bench, frames.cpu().numpy()
        bench.wait()  # the engines have streams of their own
        bench.left_out.update(self._missing)
        entrants: dict[str, Entrant] = {}
        if self._onnx_runtime is not None:
            with bench.attempt(ONNX_RUNTIME):
                entrants[ONNX_RUNTIME] = bound(self._onnx_runtime, frames, bench)
            with bench.attempt(ONNX_RUNTIME_SERVED):
                entrants[ONNX_RUNTIME_SERVED] = served(self._onnx_runtime, there)
        if self._tensorrt is not None:
            with bench.attempt(TENSORRT):
                entrants[TENSORRT] = launched(self._tensorrt, there)
            with bench.attempt(TENSORRT_SERVED):
                entrants[TENSORRT_SERVED] = served(self._tensorrt, there)
        return entrants

    def close(self) -> None:
        for runtime in (self._onnx_runtime, self._tensorrt):
            if runtime is not None:
                runtime.close()


def write_graph(model: TimeSformer, folder: Path) -> Path:
    """The FP16 graph, with its ranges measured on noise."""
    config = model.config
    exact, mixed = folder / "model.onnx", folder / "model.fp16.onnx"
    export_onnx(rewrite(model), exact)
    shape = (2, config.num_frames, config.image_size, config.image_size, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    export_fp16(exact, mixed, record_magnitudes(exact, noise))
    return mixed


def load_plan(graph: Path, largest: int) -> TensorRtRuntime:
    """The plan of a graph, built unless it lies beside it already."""
    here = TensorRt()
    key = PlanKey(
        gpu=here.cuda.gpu.name,
        compute_capability=here.cuda.gpu.compute_capability,
        tensorrt=str(here.module.__version__),
        precision="fp16",
        batches=(*(size for size in BATCHES if size < largest), largest),
    )
    wanted = Wanted(key, graph, sha256_of(graph), graph.parent / "engines")
    return here.load(build_plan(BuildJob.of(wanted)), largest)


def bound(runtime: OnnxRuntime, frames: Tensor, bench: Bench) -> Entrant:
    """Frames and answers stay on the device, and a call does not wait for the one before."""
    session = runtime._session
    binding: onnxruntime.IOBinding = session.io_binding()
    binding.bind_input(
        INPUT_NAME, frames.device.type, 0, np.uint8, tuple(frames.shape), frames.data_ptr()
    )
    for name in OUTPUT_NAMES:
        binding.bind_output(name, frames.device.type)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run() -> None:
        session.run_with_iobinding(binding, options)

    def answers() -> Answers:
        run()
        bench.wait()
        return _tensors(Outputs(*binding.copy_outputs_to_cpu()))

    run()
    # The binding holds an address; the frames must live as long.
    return Entrant(run, lambda: (bench.wait(), frames), answers)


def launched(runtime: TensorRtRuntime, frames: Frames) -> Entrant:
    """The work of a batch alone, launched again and again on frames that are on the device."""
    cuda, batch = runtime._cuda, len(frames)
    cuda.use()
    slot = runtime._free.get()
    runtime._free.put(slot)  # nobody else runs while this has its turn
    slot.frames[:batch] = frames
    cuda.to_device(slot.addresses[INPUT], slot.frames[:batch], slot.stream)
    cuda.synchronize(slot.stream)

    def run() -> None:
        cuda.launch(slot.graphs[batch], slot.stream)

    def answers() -> Answers:
        run()
        for name, array in zip(OUTPUTS, slot.outputs, strict=True):
            cuda.to_host(array[:batch], slot.addresses[name], slot.stream)
        cuda.synchronize(slot.stream)
        return _tensors(Outputs(*(array[:batch].copy() for array in slot.outputs)))

    run()
    return Entrant(run, lambda: cuda.synchronize(slot.stream), answers)


def served(runtime: Runtime, frames: Frames) -> Entrant:
    """As the service runs it: from the host and back, a thread for each batch on its way."""
    threads = ThreadPoolExecutor(runtime.slots)
    waiting: deque[Future[Outputs]] = deque()

    def finish() -> None:
        while waiting:
            waiting.popleft().result()

    runtime.run(frames)
    return Entrant(
        lambda: waiting.append(threads.submit(runtime.run, frames)),
        finish,
        lambda: _tensors(runtime.run(frames)),
    )


def _tensors(outputs: Outputs) -> Answers:
    return torch.from_numpy(outputs.logits), torch.from_numpy(outputs.embedding)
