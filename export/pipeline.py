"""From a checkpoint to a published bundle: export, verify, publish. Needs torch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors import SafetensorError

from export.bundle import (
    GRAPHS,
    LABELS,
    ONNX_FLOAT32,
    ONNX_FP16,
    ONNX_INT8,
    WEIGHTS,
    Bundle,
    BundleError,
    BundleStore,
    Cost,
    Manifest,
    Parity,
    TensorSpec,
    sha256_of,
)
from export.clips import calibration_clips, verification_clips
from export.emulation import emulate
from export.fp16 import export_fp16
from export.onnx import INPUT_NAME, OUTPUT_NAMES, ExportError, export_onnx
from export.precision import quantize
from export.products import record_magnitudes
from export.reference import run_reference
from export.rewrite import InferenceTimeSformer, multiply_adds, rewrite
from export.runtime.interface import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from export.verify import LIMITS, compare, run_in_batches
from model.checkpoints import Checkpoint, save_safetensors
from model.config import ModelConfig, Preprocessing
from model.cost import cost
from model.demo import SAMPLE_CLIP
from model.timesformer import TimeSformer
from model.training.calibration import calibrate
from model.training.errors import DataError
from model.training.evaluation import predict
from model.training.sources import VideoList

Precision = Literal["float32", "fp16", "int8"]

_LIMITS = {file: LIMITS[precision] for precision, file in GRAPHS.items()}
_PREPROCESSING_FIELDS = tuple(Preprocessing.__dataclass_fields__)
_SOFTWARE = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "av",
    "timesformer-service",
)


class VerificationError(ExportError):
    """An artefact's answers are not the network's; nothing was published."""


def export_bundle(
    checkpoint: Checkpoint,
    name: str,
    store: BundleStore,
    *,
    labels: Sequence[str] | None = None,
    videos: Sequence[Path] = (SAMPLE_CLIP,),
    precisions: Collection[Precision] = (),
    calibration: Path | None = None,
    training: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    calibrate_on: VideoList | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Exports a checkpoint, proves the export right on real frames, and publishes it.

    Args:
        labels: one a class; by default the checkpoint's own, else `class 0`, `class 1`, ...
        videos: files whose clips the artefacts are compared on.
        precisions: what the bundle shall hold besides float32, which it always holds.
        calibration: videos to measure on how large the network's numbers become, which decides
            what of it is in FP16; see `calibration_clips`.
        training: metrics to be kept in the manifest.
        temperature: what logits are to be divided by before the softmax.
        calibrate_on: videos to fit the temperature on instead, with the float32 graph; not those
            that the network was trained on.
        report: is told each step as it begins.

    Raises:
        DataError: the videos to calibrate on cannot be decoded, or are of one group only.
        BundleError: the labels do not fit, or the store refuses the bundle or cannot be written.
        ExportError: the network cannot become a graph.
        VerificationError: the graph's answers are off.
        VideoError: one of `videos` cannot be read.
    """
    config = checkpoint.config
    parent = store.active(name)  # also refuses a bad name or store before the work begins
    names = _labels(labels or checkpoint.labels, config.num_classes)
    model = checkpoint.build()
    clips = verification_clips(config, videos)
    ranges_on = clips
    if "fp16" in precisions:
        report("preparing the clips to calibrate on")
        ranges_on = np.concatenate([clips, calibration_clips(config, calibration)])
    with store.staging(name) as staging:
        report("writing the weights")
        _write_weights(model, staging / WEIGHTS, names)
        (staging / LABELS).write_text("".join(f"{label}\n" for label in names), encoding="utf-8")
        report("exporting to ONNX")
        network = rewrite(model)
        export_onnx(network, staging / ONNX_FLOAT32)
        products = {}
        if "fp16" in precisions:
            report(f"measuring ranges on {len(ranges_on)} clips")
            magnitudes = record_magnitudes(staging / ONNX_FLOAT32, ranges_on)
            report("rounding to FP16")
            products[ONNX_FP16] = export_fp16(
                staging / ONNX_FLOAT32, staging / ONNX_FP16, magnitudes
            )
        if "int8" in precisions:
            report("rounding to INT8")
            quantize(staging / ONNX_FLOAT32, staging / ONNX_INT8)
        graphs = [staging / file for file in GRAPHS.values() if (staging / file).is_file()]
        report(f"verifying on {len(clips)} clips")
        verification = _verify(model, graphs, clips)
        if calibrate_on is not None:
            report(f"calibrating on {len(calibrate_on.samples)} videos")
            temperature = _fit_temperature(graphs[0], config.preprocessing, calibrate_on)
        report("publishing")
        fields = config.to_dict()
        preprocessing = {key: fields.pop(key) for key in _PREPROCESSING_FIELDS}
        manifest = Manifest(
            name=name,
            version="0",  # publish() numbers it
            created=datetime.now(UTC),
            source=checkpoint.kind,
            architecture=fields,
            preprocessing=preprocessing,
            labels=names,
            inputs=(TensorSpec(name=INPUT_NAME, dtype="uint8", shape=_clip_shape(config)),),
            outputs=tuple(
                TensorSpec(name=output, dtype="float32", shape=(-1, size))
                for output, size in zip(
                    OUTPUT_NAMES, (config.num_classes, config.embed_dim), strict=True
                )
            ),
            weights_sha256=sha256_of(staging / WEIGHTS),
            files={},
            software=software_versions(),
            network_cost=_network_cost(config),
            graph_cost=_graph_cost(network),
            verification=verification,
            products=products,
            temperature=temperature,
            training=dict(training) if training else None,
            parent=parent,
        )
        return store.publish(staging, manifest)


def _write_weights(model: TimeSformer, path: Path, labels: Sequence[str]) -> None:
    try:
        save_safetensors(model, path, model.config, labels=labels)
    except SafetensorError as error:  # its own words for a full disk too; no OSError
        raise BundleError(f"cannot write {path.name}: {error}; nothing has changed") from error


def _verify(
    model: TimeSformer, graphs: Sequence[Path], clips: NDArray[np.uint8]
) -> dict[str, Parity]:
    """Each graph's parity with the network, which it has passed, by file name."""
    reference = run_reference(model, clips)
    return {graph.name: _verify_graph(graph, reference, clips) for graph in graphs}


def _verify_graph(graph: Path, reference: Outputs, clips: NDArray[np.uint8]) -> Parity:
    emulated = graph.name == ONNX_FP16  # for GPUs, which round where the graph says
    runtime = OnnxRuntime(emulate(onnx.load(graph)) if emulated else graph, cuda=False)
    try:
        parity = compare(reference, run_in_batches(runtime, clips), _LIMITS[graph.name])
    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
        raise VerificationError(
            f"{graph.name} does not run as the network does: {error}; nothing was published"
        ) from error
    finally:
        runtime.close()
    if not parity.passed:
        raise VerificationError(
            f"{graph.name} differs from the network by {parity.max_difference:.3g} in its logits "
            f"and {parity.embedding_max_difference:.3g} in its embedding, {_verdict(parity)}: "
            "nothing was published"
        )
    return parity


def _fit_temperature(graph: Path, preprocessing: Preprocessing, videos: VideoList) -> float:
    runtime = OnnxRuntime(graph, cuda=False)
    try:
        found = predict(videos, preprocessing, lambda frames: runtime.run(frames).logits)
    finally:
        runtime.close()
    calibration = calibrate(found)
    if calibration is None:
        raise DataError(
            "the videos to calibrate on are of one group, or one video: there is nothing to judge "
            "the temperature on; give more, or state it with --temperature"
        )
    return calibration.temperature


def _verdict(parity: Parity) -> str:
    if parity.limit is not None:
        return f"more than {parity.limit:.3g}"
    return (
        f"with cosines of {parity.centred_cosine:.4f} and {parity.embedding_cosine:.4f} "
        f"where {parity.cosine_limit} is needed, "
        f"and its label on {parity.top1_agreement:.0%} of the clips"
    )


def _network_cost(config: ModelConfig) -> Cost:
    counted = cost(config)
    return Cost(parameters=counted.parameters, multiply_adds=counted.multiply_adds)


def _graph_cost(network: InferenceTimeSformer) -> Cost:
    return Cost(
        parameters=sum(tensor.numel() for tensor in network.state_dict().values()),
        multiply_adds=multiply_adds(network),
    )


def software_versions() -> dict[str, str]:
    """Versions of what took part in the export."""
    versions = {"python": platform.python_version()}
    for package in _SOFTWARE:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _clip_shape(config: ModelConfig) -> tuple[int, ...]:
    return (-1, config.num_frames, config.image_size, config.image_size, 3)


def _labels(labels: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    if labels is None:
        return tuple(f"class {index}" for index in range(num_classes))
    if len(labels) != num_classes:
        raise BundleError(
            f"there are {len(labels)} labels for a model of {num_classes} classes: "
            "pass --labels FILE with one label a line, in the order of the classes"
        )
    return tuple(labels)
