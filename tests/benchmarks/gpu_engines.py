"""ONNX Runtime and TensorRT on a GPU, for `tests/benchmarks/gpu.py`; needs onnx and the engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from export.bundle import sha256_of
from export.fp16 import export_fp16
from export.onnx import INPUT_NAME, OUTPUT_NAMES, export_onnx
from export.products import record_magnitudes
from export.rewrite import rewrite
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import PlanKey
from export.runtime.tensorrt import TensorRt, Wanted
from export.tensorrt import BuildJob, build_plan
from model.timesformer import TimeSformer

Engine = Callable[[Tensor], Callable[[], Any]]
"""Frames on the device to what runs the network on them."""


def write_graph(model: TimeSformer, folder: Path) -> Path:
    """The FP16 graph, with its ranges measured on noise."""
    config = model.config
    exact, mixed = folder / "model.onnx", folder / "model.fp16.onnx"
    export_onnx(rewrite(model), exact)
    shape = (2, config.num_frames, config.image_size, config.image_size, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    export_fp16(exact, mixed, record_magnitudes(exact, noise))
    return mixed


def onnx_runtime(graph: Path) -> Engine:
    """Frames and answers stay on the device."""
    session = OnnxRuntime(graph, cuda=True, precision="fp16")._session

    def bind(frames: Tensor) -> Callable[[], Any]:
        binding: onnxruntime.IOBinding = session.io_binding()
        address = frames.data_ptr()
        binding.bind_input(INPUT_NAME, "cuda", 0, np.uint8, tuple(frames.shape), address)
        for name in OUTPUT_NAMES:
            binding.bind_output(name, "cuda")
        return lambda: (session.run_with_iobinding(binding), frames)

    return bind


def tensorrt(graph: Path, largest: int) -> Engine:
    """As it is served: frames come from the host, so that their copy is in the time."""
    here = TensorRt()
    batches = tuple(sorted({size for size in (1, 8, 32) if size < largest} | {largest}))
    key = PlanKey(
        gpu=here.cuda.gpu.name,
        compute_capability=here.cuda.gpu.compute_capability,
        tensorrt=str(here.module.__version__),
        precision="fp16",
        batches=batches,
    )
    job = BuildJob.of(Wanted(key, graph, sha256_of(graph), graph.parent / "engines"))
    runtime = here.load(build_plan(job), largest)

    def bind(frames: Tensor) -> Callable[[], Any]:
        there = frames.cpu().numpy()
        torch.cuda.synchronize()
        return lambda: runtime.run(there)

    return bind
