"""What a bundle's engines are measured against: the same weights in the programs that people use.

Needs torch. What is not installed, or does not run, is left out with its reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.artefacts import LeftOut
from export.bench import Entrant
from export.bundle import Bundle
from export.manifest import ONNX_FLOAT32
from export.onnx import export_onnx
from export.reference import load_network
from export.runtime.interface import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from model.checkpoints import save_huggingface
from model.cost import cost
from tests.benchmarks.published import AsPublished

NAIVE = "naive export, ONNX Runtime"
EAGER = "original, PyTorch eager"
COMPILED = "original, torch.compile"
HUGGING_FACE = "Hugging Face transformers"
OPENVINO = "rewritten graph, OpenVINO"


def open_yardsticks(
    bundle: Bundle,
    folder: Path,
    *,
    cuda: bool,
    threads: int,
    report: Callable[[str], None] = lambda step: None,
) -> Iterator[Entrant | LeftOut]:
    """All that run here, float32, with the bundle's weights.

    Args:
        folder: for files on the way; they are not needed any more when this is through.
        cuda: run them on the GPU.
    """
    torch.set_num_threads(threads)
    if cuda:  # as the rewritten graph: a product of float32 numbers is one of float32 numbers
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network = AsPublished.of(load_network(bundle))
    work = cost(network.config).multiply_adds
    openers: dict[str, Callable[[], Callable[[NDArray[np.uint8]], Outputs]]] = {
        NAIVE: lambda: _naive(network, folder, cuda, threads),
        EAGER: lambda: _torch(network, network, cuda),
        COMPILED: lambda: _torch(torch.compile(network, dynamic=False), network, cuda),
        HUGGING_FACE: lambda: _hugging_face(network, folder / "hf", cuda),
        OPENVINO: lambda: _openvino(bundle.file(ONNX_FLOAT32), threads),
    }
    if cuda:
        yield LeftOut(OPENVINO, "is for CPUs, and a GPU is measured")
        del openers[OPENVINO]
    size = network.config.image_size
    clip = np.zeros((1, network.config.num_frames, size, size, 3), np.uint8)
    for name, opener in openers.items():
        report(f"preparing: {name}")
        try:
            run = opener()
            run(clip)
        except Exception as error:  # of four programs, each with exceptions of its own
            yield LeftOut(name, _why(error))
        else:
            counted = _graph_work(bundle) if name == OPENVINO else work
            yield Entrant(name, run, counted)


def _why(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{(error.name or '').partition('.')[0]} is not installed"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _graph_work(bundle: Bundle) -> int | None:
    counted = bundle.manifest.graph_cost
    return counted.multiply_adds if counted else None


def _naive(
    network: AsPublished, folder: Path, cuda: bool, threads: int
) -> Callable[[NDArray[np.uint8]], Outputs]:
    path = folder / "naive.onnx"
    export_onnx(network.cpu(), path)
    return OnnxRuntime(path, cuda=cuda, threads=threads).run


def _torch(
    module: Callable[[Tensor], tuple[Tensor, Tensor]], network: AsPublished, cuda: bool
) -> Callable[[NDArray[np.uint8]], Outputs]:
    device = torch.device("cuda" if cuda else "cpu")
    network.to(device)

    def run(frames: NDArray[np.uint8]) -> Outputs:
        with torch.inference_mode():
            logits, embedding = module(torch.from_numpy(frames).to(device))
            return Outputs(logits.cpu().numpy(), embedding.cpu().numpy())

    return run


def _hugging_face(
    network: AsPublished, folder: Path, cuda: bool
) -> Callable[[NDArray[np.uint8]], Outputs]:
    from transformers import TimesformerForVideoClassification

    device = torch.device("cuda" if cuda else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    save_huggingface(network, folder)
    with _quiet_transformers():
        theirs: Any = TimesformerForVideoClassification.from_pretrained(folder)
    theirs = theirs.eval().to(device)
    mean, std = (t.to(device)[:, None, None] for t in (network.mean, network.std))

    def run(frames: NDArray[np.uint8]) -> Outputs:
        with torch.inference_mode():
            pixels = torch.from_numpy(frames).to(device).permute(0, 1, 4, 2, 3)
            answer = theirs((pixels / 255 - mean) / std, output_hidden_states=True)
            embedding = theirs.timesformer.layernorm(answer.hidden_states[-1][:, 0])
            return Outputs(answer.logits.cpu().numpy(), embedding.cpu().numpy())

    return run


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as theirs

    logging: Any = theirs  # which has no types
    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def _openvino(graph: Path, threads: int) -> Callable[[NDArray[np.uint8]], Outputs]:
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",  # some CPUs would take bfloat16
    }
    compiled = core.compile_model(core.read_model(str(graph)), "CPU", options)

    def run(frames: NDArray[np.uint8]) -> Outputs:
        answer = compiled([frames])
        return Outputs(np.array(answer[0]), np.array(answer[1]))

    return run
