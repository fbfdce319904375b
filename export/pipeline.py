"""From a checkpoint to a published bundle: export, verify, publish. Needs torch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors import SafetensorError

from export.bundle.bundle import Bundle, BundleError, BundleStore, sha256_of
from export.bundle.manifest import (
    GPU_KINDS,
    GRAPHS,
    LABELS,
    ONNX_FLOAT32,
    REPORT,
    WEIGHTS,
    Cost,
    Manifest,
    Parity,
    TensorSpec,
)
from export.bundle.report import write_report
from export.calibration.clips import calibration_clips, held_out_clips, verification_clips
from export.graph.build import Clips, Precision, kinds_of, write_graphs
from export.graph.onnx_export import INPUT_NAME, OUTPUT_NAMES, ExportError, export_onnx
from export.graph.rewrite import InferenceTimeSformer, multiply_adds, rewrite
from export.precision_choice import choose
from export.runtime.interface import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.gpu_emulation import emulate
from export.verification.parity import LIMITS, hold
from export.verification.torch_reference import run_reference
from model.checkpoints import Checkpoint, save_safetensors
from model.config import ModelConfig, Preprocessing
from model.data.lists import VideoList
from model.demo import SAMPLE_CLIP
from model.evaluation.calibration import calibrate
from model.evaluation.metrics import predict
from model.network.cost import cost
from model.network.timesformer import TimeSformer
from model.training.errors import DataError

_KINDS = {file: kind for kind, file in GRAPHS.items()}
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
        precisions: what the bundle shall hold besides float32, which it always holds. `auto` tries
            all, leaves out what fails, and notes which is the fastest of the rest.
        calibration: videos to measure on how the network's numbers are spread, which decides what
            of it is in FP16, INT8 and FP8; see `calibration_clips`.
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
    kinds = kinds_of(precisions)
    # Those that are named must pass; what `auto` adds may be left out.
    optional = set(kinds) - set(kinds_of([each for each in precisions if each != "auto"]))
    measured_on = None
    if not GPU_KINDS.isdisjoint(kinds):
        report("preparing the clips to calibrate on")
        source = calibration.name if calibration else "rendered"
        measured_on = Clips(calibration_clips(config, calibration), clips, source)
        clips = np.concatenate([clips, held_out_clips(config, calibration)])
    with store.staging(name) as staging:
        report("writing the weights")
        _write_weights(model, staging / WEIGHTS, names)
        (staging / LABELS).write_text("".join(f"{label}\n" for label in names), encoding="utf-8")
        report("exporting to ONNX")
        network = rewrite(model)
        export_onnx(network, staging / ONNX_FLOAT32)
        written = write_graphs(staging, kinds, measured_on, optional, report)
        graphs = [staging / file for file in GRAPHS.values() if (staging / file).is_file()]
        verification, failed = _verify(model, graphs, clips, optional, report)
        written.rejected.update(failed)
        fastest = {}
        if "auto" in precisions:
            report("timing")
            fastest = choose(staging, verification, clips[:1])
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
            products={
                file: found for file, found in written.products.items() if file in verification
            },
            calibration=written.calibration(measured_on),
            fastest=fastest,
            rejected=written.rejected,
            temperature=temperature,
            training=dict(training) if training else None,
            parent=parent,
        )
        write_report(staging / REPORT, manifest)
        return store.publish(staging, manifest)


def _write_weights(model: TimeSformer, path: Path, labels: Sequence[str]) -> None:
    try:
        save_safetensors(model, path, model.config, labels=labels)
    except SafetensorError as error:  # its own words for a full disk too; no OSError
        raise BundleError(f"cannot write {path.name}: {error}; nothing has changed") from error


def _verify(
    model: TimeSformer,
    graphs: Sequence[Path],
    clips: NDArray[np.uint8],
    optional: Collection[str],
    report: Callable[[str], None],
) -> tuple[dict[str, Parity], dict[str, str]]:
    """Each graph's parity with the network, which it has passed, by file name; and why an optional
    one has not, which is removed."""
    reference = run_reference(model, clips)
    passed, failed = {}, {}
    for graph in graphs:
        report(f"verifying {graph.name} on {len(clips)} clips")
        try:
            passed[graph.name] = _verify_graph(graph, reference, clips)
        except VerificationError as error:
            if _KINDS[graph.name] not in optional:
                raise VerificationError(f"{error}: nothing was published") from error
            failed[graph.name] = str(error)
            graph.unlink()
    return passed, failed


def _verify_graph(graph: Path, reference: Outputs, clips: NDArray[np.uint8]) -> Parity:
    kind = _KINDS[graph.name]
    model = emulate(onnx.load(graph)) if kind in GPU_KINDS else graph
    runtime = OnnxRuntime(model, cuda=False)
    try:
        parity = hold(runtime, clips, reference, LIMITS[kind])
    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
        raise VerificationError(
            f"{graph.name} does not run as the network does: {error}"
        ) from error
    finally:
        runtime.close()
    if not parity.passed:
        raise VerificationError(
            f"{graph.name} differs from the network by {parity.max_difference:.3g} in its logits "
            f"and {parity.embedding_max_difference:.3g} in its embedding, {_verdict(parity)}"
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
        f"where {parity.cosine_limit} is needed, off by {parity.relative_error:.3f} and "
        f"{parity.embedding_relative_error:.3f} of their length (limit {parity.error_limit}), "
        f"scores off by {parity.softmax_divergence:.2g} nats (limit {parity.divergence_limit}), "
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
