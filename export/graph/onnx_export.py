"""The ONNX graph of a network: uint8 `frames` in, float32 `logits` and `embedding` out.

Normalisation is inside, the batch is dynamic, and every name and shape is checked here once, so
that a runtime need not guess.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch

from export.graph.rewrite import InferenceTimeSformer
from model.network.timesformer import TimeSformer

INPUT_NAME = "frames"
OUTPUT_NAMES = ("logits", "embedding")
# 20 has Gelu as one operator; TensorRT and ONNX Runtime both know it.
OPSET = 20
_SCOPES = "pkg.torch.onnx.name_scopes"


class ExportError(RuntimeError):
    """The network could not be turned into a valid graph."""


def export_onnx(model: TimeSformer | InferenceTimeSformer, path: Path) -> None:
    """Writes a network to `path` as one self-contained ONNX file (weights inside, below 2 GiB).

    A bundle holds the rewritten one; the original is the yardstick of the benchmarks.

    Raises:
        ExportError: the exporter or the ONNX checker refused the network.
    """
    config = model.config
    model = model.eval()
    # Two clips, not one: the exporter would take a batch of 1 for a constant.
    example = torch.zeros(
        (2, config.num_frames, config.image_size, config.image_size, 3), dtype=torch.uint8
    )
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=[INPUT_NAME],
                output_names=list(OUTPUT_NAMES),
                dynamic_shapes={"frames": {0: batch}},
                opset_version=OPSET,
                verbose=False,
            )
        if program is None:
            raise ExportError("the ONNX exporter returned no program")
        graph = program.model_proto
        _name_nodes(graph.graph)
        _strip_traces(graph)
        onnx.save(graph, path)
        onnx.checker.check_model(str(path), full_check=True)
    except (torch.onnx.errors.OnnxExporterError, onnx.checker.ValidationError) as error:
        raise ExportError(f"the network could not be exported to ONNX: {error}") from error


def _name_nodes(graph: onnx.GraphProto) -> None:
    """`blocks.0.main.attention.query/MatMul`: the module that a node is of, and its operator."""
    seen: Counter[str] = Counter()
    for node in graph.node:
        scopes = {item.key: item.value for item in node.metadata_props}.get(_SCOPES, "['']")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if not scope.startswith("_")]
        name = f"{modules[-1] if modules else ''}/{node.op_type}".lstrip("/")
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1


def _strip_traces(proto: onnx.ModelProto) -> None:
    """Drops the Python stack traces of the exporter: a tenth of a small file, and local paths."""
    graph = proto.graph
    for item in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for tensor in graph.initializer:
        tensor.ClearField("metadata_props")


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter prints and warns about its own internals; none of it is about the model."""
    loggers = [logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
