"""One pass of clips through a float32 graph, for all that is to be known of the numbers in it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto
from onnx import shape_inference as inference

from export.graph.onnx_export import INPUT_NAME, OUTPUT_NAMES
from export.runtime.cores import usable_cores
from export.runtime.interface import Outputs

Shapes = Mapping[str, Sequence[int]]
"""Of the tensors that nodes give, for one clip."""


class Recorder(Protocol):
    """Looks at some tensors of a graph."""

    def attach(self, graph: GraphProto, shapes: Shapes) -> None:
        """Adds what it looks at to the graph's outputs."""

    def take(self, clip: int, values: Sequence[NDArray[Any]]) -> None:
        """Is given these outputs, of each clip by its number."""


def record(path: Path, clips: NDArray[np.uint8], *recorders: Recorder) -> Outputs:
    """Runs a float32 graph, a clip at a time, with its recorders; its answers.

    Args:
        path: as `export_onnx` wrote it.
        clips: uint8 (clips, time, height, width, 3).
    """
    model = onnx.load(path)
    graph = model.graph
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    known = inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.value_info
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in known
    }
    ends = [len(OUTPUT_NAMES)]
    for recorder in recorders:
        recorder.attach(graph, shapes)
        ends.append(len(graph.output))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    answers = []
    for index, clip in enumerate(clips):
        found = session.run(None, {INPUT_NAME: clip[None]})
        answers.append(found[: ends[0]])
        for recorder, (start, end) in zip(recorders, itertools.pairwise(ends), strict=True):
            recorder.take(index, found[start:end])
    logits, embedding = (np.concatenate(part) for part in zip(*answers, strict=True))
    return Outputs(logits, embedding)
