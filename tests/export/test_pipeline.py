"""From a checkpoint to a published bundle; and what stops it on the way."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from export.bundle.bundle import Bundle, BundleError, BundleStore
from export.bundle.manifest import (
    GRAPHS,
    LABELS,
    MANIFEST,
    ONNX_FLOAT32,
    ONNX_FP8,
    ONNX_FP16,
    ONNX_INT8,
    ONNX_INT8_QDQ,
    REPORT,
    WEIGHTS,
)
from export.calibration.clips import verification_clips
from export.graph.onnx_export import ExportError
from export.pipeline import VerificationError, export_bundle
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.parity import LIMITS, Limits
from export.verification.torch_reference import run_reference
from model.checkpoints import Checkpoint, load_checkpoint
from model.data.lists import Sample, VideoList
from model.evaluation.calibration import calibrate
from model.evaluation.metrics import predict
from model.network.cost import cost
from model.network.timesformer import TimeSformer
from model.training.errors import DataError
from model.video import UndecodableVideo, load_clips

from .conftest import write_video

FullDisk = Callable[[int], AbstractContextManager[None]]


class TestTheBundle:
    def test_is_sound_and_holds_these_files(self, exported: Bundle) -> None:
        exported.verify()
        found = {path.name for path in exported.path.iterdir()}
        assert found == {LABELS, MANIFEST, ONNX_FLOAT32, REPORT, WEIGHTS}
        assert exported.file(LABELS).read_text().splitlines() == list(exported.manifest.labels)

    def test_its_weights_load_again_bit_for_bit(
        self, exported: Bundle, checkpoint: Checkpoint
    ) -> None:
        again = load_checkpoint(exported.file(WEIGHTS))
        assert again.config == checkpoint.config
        assert again.labels == checkpoint.labels
        assert all(torch.equal(again.state[key], checkpoint.state[key]) for key in checkpoint.state)

    def test_its_manifest_says_everything(self, exported: Bundle, checkpoint: Checkpoint) -> None:
        manifest = json.loads((exported.path / MANIFEST).read_text())

        assert (manifest["schema_version"], manifest["name"], manifest["version"]) == (
            1,
            "tiny",
            "1",
        )
        assert manifest["source"] == "timesformer"
        assert manifest["architecture"] == {
            "attention_type": "divided_space_time",
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "mlp_ratio": 4.0,
            "num_classes": 5,
            "drop_path_rate": 0.0,
        }
        assert manifest["preprocessing"] == {
            "num_frames": 4,
            "image_size": 32,
            "sampling": "dense",
            "frame_stride": 32,
            "mean": [0.45] * 3,
            "std": [0.225] * 3,
        }
        assert exported.config == checkpoint.config
        assert manifest["labels"] == [f"action {index}" for index in range(5)]
        assert manifest["inputs"] == [
            {"name": "frames", "dtype": "uint8", "shape": [-1, 4, 32, 32, 3]}
        ]
        assert manifest["outputs"] == [
            {"name": "logits", "dtype": "float32", "shape": [-1, 5]},
            {"name": "embedding", "dtype": "float32", "shape": [-1, 24]},
        ]
        assert manifest["weights_sha256"] == manifest["files"][WEIGHTS]["sha256"]
        assert manifest["software"]["torch"] == version("torch")
        assert manifest["software"].keys() >= {"python", "onnx", "onnxruntime", "numpy", "av"}
        assert manifest["training"] == {"top1": 0.5}
        assert manifest["parent"] is None

    def test_its_manifest_says_what_the_rewrites_saved(self, exported: Bundle) -> None:
        before, after = exported.manifest.network_cost, exported.manifest.graph_cost
        counted = cost(exported.config)
        assert before is not None
        assert after is not None
        assert before.parameters == counted.parameters
        assert before.multiply_adds == counted.multiply_adds
        assert after.multiply_adds < 0.8 * before.multiply_adds
        assert after.parameters < before.parameters

    def test_its_verification_is_in_the_manifest(self, exported: Bundle) -> None:
        (parity,) = exported.manifest.verification.values()
        assert parity.passed
        assert parity.clips == 4  # three crops of the video, and noise
        assert 0 < parity.max_difference < 1e-5 < parity.limit
        assert parity.top1_agreement == 1


class TestEveryPrecision:
    """The bundle of all precisions, which one export with `auto` has made."""

    def test_auto_publishes_all_graphs_and_their_order(self, whole: Bundle) -> None:
        whole.verify()
        manifest = whole.manifest
        assert manifest.rejected == {}
        assert manifest.verification.keys() == set(GRAPHS.values())
        assert {path.name for path in whole.path.glob("*.onnx")} == set(GRAPHS.values())
        assert manifest.fastest["gpu"].order == ("fp8", "int8", "fp16", "float32")
        on_cpu = manifest.fastest["cpu"]
        assert on_cpu.milliseconds is not None
        first, second = (on_cpu.milliseconds[precision] for precision in on_cpu.order)
        assert 0 < first <= second
        assert set(on_cpu.order) == {"float32", "int8"}

    def test_products_are_published_with_their_precision_and_numbers(self, whole: Bundle) -> None:
        halves = whole.manifest.products[ONNX_FP16]
        assert halves[0].name == "patch_embed/MatMul"
        assert halves[0].inputs[0] == 255
        assert all(product.precision == "fp16" and product.output > 0 for product in halves)
        eights = whole.manifest.products[ONNX_FP8]
        assert {"fp8"} <= {product.precision for product in eights} <= {"fp8", "fp16"}
        for product in eights:
            kept = product.precision == "fp16" and product.error is not None
            assert kept == bool(product.reason)


@pytest.mark.usefixtures("quick_export")
class TestExporting:
    def test_precisions_are_calibrated_on_the_videos_given_and_steps_reported(
        self, checkpoint: Checkpoint, store: BundleStore, video: Path, tmp_path: Path
    ) -> None:
        steps: list[str] = []
        (tmp_path / "taken").mkdir()
        for colour in ("green", "blue"):
            write_video(tmp_path / "taken" / f"{colour}.mp4", colour)
        bundle = export_bundle(
            *(checkpoint, "tiny", store),
            videos=[video],
            precisions=["fp8"],
            calibration=tmp_path / "taken",
            report=steps.append,
        )
        bundle.verify()
        assert steps[:4] == [
            "preparing the clips to calibrate on",
            "writing the weights",
            "exporting to ONNX",
            "measuring ranges on 6 clips",
        ]
        assert steps[-3:] == [
            "verifying model.onnx on 4 clips",
            "verifying model.fp8.onnx on 4 clips",
            "publishing",
        ]
        assert bundle.manifest.verification.keys() == {ONNX_FLOAT32, ONNX_FP8}
        calibration = bundle.manifest.calibration
        assert calibration is not None
        assert (calibration.source, calibration.clips) == ("taken", 2)
        agreement = calibration.agreement[ONNX_FP8]
        assert calibration.methods[ONNX_FP8] == max(agreement, key=agreement.__getitem__)

    def test_the_parent_is_what_was_active(
        self, checkpoint: Checkpoint, store: BundleStore, video: Path
    ) -> None:
        export_bundle(checkpoint, "tiny", store, videos=[video])
        store.activate("tiny", "1")
        export_bundle(checkpoint, "tiny", store, videos=[video])
        third = export_bundle(checkpoint, "tiny", store, videos=[video])
        assert (third.version, third.manifest.parent) == ("3", "1")

    def test_labels_that_are_given_win_over_the_checkpoints(
        self, checkpoint: Checkpoint, store: BundleStore, video: Path
    ) -> None:
        labels = ["gehen", "läuft", "跑", "d", "e"]
        bundle = export_bundle(checkpoint, "tiny", store, labels=labels, videos=[video])
        assert list(bundle.manifest.labels) == labels
        assert bundle.file(LABELS).read_text(encoding="utf-8").splitlines() == labels
        assert load_checkpoint(bundle.file(WEIGHTS)).labels == tuple(labels)

    def test_labels_that_do_not_fit_are_refused_before_any_work(
        self, checkpoint: Checkpoint, store: BundleStore, video: Path
    ) -> None:
        with pytest.raises(BundleError, match="2 labels for a model of 5 classes: pass --labels"):
            export_bundle(checkpoint, "tiny", store, labels=["a", "b"], videos=[video])
        assert not store.root.exists()

    @pytest.mark.parametrize("name", ["../tiny", "a b"])
    def test_a_bad_name_is_refused_before_any_work(
        self, checkpoint: Checkpoint, store: BundleStore, video: Path, name: str
    ) -> None:
        steps: list[str] = []
        with pytest.raises(BundleError, match="is no bundle name"):
            export_bundle(checkpoint, name, store, videos=[video], report=steps.append)
        assert steps == []

    def test_a_video_that_cannot_be_read_is_named(
        self, checkpoint: Checkpoint, store: BundleStore, video: Path, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(video.read_bytes()[:40])
        with pytest.raises(UndecodableVideo, match=r"cannot verify on .*broken\.mp4: ."):
            export_bundle(checkpoint, "tiny", store, videos=[video, broken])
        assert not store.root.exists()

    def test_the_temperature_is_fitted_with_the_exported_graph(
        self, checkpoint: Checkpoint, store: BundleStore, video: Path, exported: Bundle
    ) -> None:
        runtime = OnnxRuntime(exported.file(ONNX_FLOAT32), cuda=False)
        clips = load_clips(video, exported.config.preprocessing).frames
        said = int(runtime.run(clips).logits[0].argmax())
        # Right on all ten videos, and far less sure of it.
        samples = tuple(Sample(str(video), said, f"take {take}") for take in range(10))
        videos = VideoList(samples, exported.manifest.labels)
        bundle = export_bundle(checkpoint, "tiny", store, videos=[video], calibrate_on=videos)
        found = predict(
            videos, exported.config.preprocessing, lambda frames: runtime.run(frames).logits
        )
        expected = calibrate(found)
        assert expected is not None
        assert bundle.manifest.temperature == expected.temperature < 1

        alone = VideoList(samples[:1], exported.manifest.labels)
        with pytest.raises(DataError, match="nothing to judge"):
            export_bundle(checkpoint, "tiny", store, videos=[video], calibrate_on=alone)

    def test_auto_leaves_out_what_fails_where_the_same_by_name_is_an_error(
        self,
        checkpoint: Checkpoint,
        store: BundleStore,
        video: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        limits = {**LIMITS, "int8": Limits(None, 0.9999999)}
        monkeypatch.setattr("export.pipeline.LIMITS", limits)
        bundle = export_bundle(checkpoint, "tiny", store, videos=[video], precisions=["auto"])
        bundle.verify()
        assert bundle.manifest.rejected.keys() == {ONNX_INT8}
        assert "0.9999999 is needed" in bundle.manifest.rejected[ONNX_INT8]
        assert "published" not in bundle.manifest.rejected[ONNX_INT8]
        assert ONNX_INT8 not in bundle.manifest.files
        assert ONNX_INT8_QDQ in bundle.manifest.files
        assert bundle.manifest.fastest["cpu"].order == ("float32",)
        with pytest.raises(VerificationError, match=r"0\.9999999 is needed.*nothing was published"):
            export_bundle(checkpoint, "tiny", store, videos=[video], precisions=["auto", "int8"])
        assert store.versions("tiny") == ["1"]

    def test_8_bits_that_spoil_every_product_are_an_error_and_auto_goes_on_without_them(
        self,
        checkpoint: Checkpoint,
        store: BundleStore,
        video: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("export.graph.qdq._PRODUCT_ERROR", 0.0)
        with pytest.raises(ExportError, match="FP8 puts every product off"):
            export_bundle(checkpoint, "tiny", store, videos=[video], precisions=["fp8"])
        assert store.versions("tiny") == []
        bundle = export_bundle(checkpoint, "tiny", store, videos=[video], precisions=["auto"])
        assert bundle.manifest.rejected.keys() == {ONNX_INT8_QDQ, ONNX_FP8}
        assert bundle.manifest.fastest["gpu"].order == ("fp16", "float32")

    def test_a_full_disk_is_an_error_of_ours_and_the_store_is_as_it_was(
        self, checkpoint: Checkpoint, store: BundleStore, video: Path, full_disk: FullDisk
    ) -> None:
        export_bundle(checkpoint, "tiny", store, videos=[video])
        weights, graph = (store.open("tiny", "1").file(f) for f in (WEIGHTS, ONNX_FLOAT32))
        assert weights.stat().st_size < graph.stat().st_size

        for room in (1000, weights.stat().st_size + 1):  # full at the weights, at the graph
            with pytest.raises(BundleError, match="cannot write"), full_disk(room):
                export_bundle(checkpoint, "tiny", store, videos=[video])

        steps: list[str] = []
        held = contextlib.ExitStack()

        def fill(step: str) -> None:
            steps.append(step)
            if step == "rounding to INT8":
                held.enter_context(full_disk(1000))

        everything: dict[str, Any] = {"precisions": ["auto"], "report": fill}
        with held, pytest.raises(BundleError, match="cannot write"):
            export_bundle(checkpoint, "tiny", store, videos=[video], **everything)
        assert steps[-1] == "rounding to INT8", "auto leaves out what fails its check alone"

        assert store.versions("tiny") == ["1"]
        assert [path.name for path in (store.root / "tiny").iterdir()] == ["1"]


def shift_output(graph: onnx.GraphProto, name: str) -> None:
    """Adds 0.01 to an output of the graph."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}_right" if each == name else each for each in names]
    graph.initializer.append(numpy_helper.from_array(np.array(0.01, np.float32), "shift"))
    graph.node.append(helper.make_node("Add", [f"{name}_right", "shift"], [name]))


def spoil_head(graph: onnx.GraphProto) -> None:
    (bias,) = (tensor for tensor in graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(5, math.nan, np.float32), bias.name))


def fix_batch(graph: onnx.GraphProto) -> None:
    """As if the exporter had taken the batch for a constant."""
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda graph: shift_output(graph, "logits"), r"differs .* by 0\.01 in its logits"),
        (lambda graph: shift_output(graph, "embedding"), r"and 0\.01 in its embedding"),
        (spoil_head, "differs from the network by nan"),
        (fix_batch, "does not run as the network does"),
    ],
    ids=["logits", "embedding", "nan", "fixed batch"],
)
def test_a_graph_whose_answers_are_off_is_not_published(
    spoil: Callable[[onnx.GraphProto], None],
    reason: str,
    exported: Bundle,
    checkpoint: Checkpoint,
    store: BundleStore,
    video: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def export_wrongly(model: TimeSformer, path: Path) -> None:
        proto = onnx.load(exported.file(ONNX_FLOAT32))
        spoil(proto.graph)
        onnx.save(proto, path)

    monkeypatch.setattr("export.pipeline.export_onnx", export_wrongly)
    shutil.copytree(exported.path.parent, store.root / "tiny")

    with pytest.raises(VerificationError, match=reason) as caught:
        export_bundle(checkpoint, "tiny", store, videos=[video])

    assert "nothing was published" in str(caught.value)
    assert isinstance(caught.value, ExportError)
    assert [path.name for path in (store.root / "tiny").iterdir()] == ["1"]
    store.open("tiny", "1").verify()


def test_a_change_of_any_single_weight_fails_the_gate(
    exported: Bundle, checkpoint: Checkpoint, video: Path
) -> None:
    """The clips that are compared on exercise every tensor: none could be exported wrongly."""
    from export.verification.parity import compare, run_in_batches

    clips = verification_clips(checkpoint.config, [video])
    answers = run_in_batches(OnnxRuntime(exported.file(ONNX_FLOAT32), cuda=False), clips)
    model = checkpoint.build()
    blind = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            original = parameter.clone()
            parameter.mul_(1.1)
            if compare(run_reference(model, clips), answers).passed:
                blind.append(name)
            parameter.copy_(original)
    assert blind == []


def test_clips_to_compare_on_are_three_crops_a_video_and_noise(
    checkpoint: Checkpoint, video: Path, tmp_path: Path
) -> None:
    blue = write_video(tmp_path / "blue.mp4", "blue")
    clips = verification_clips(checkpoint.config, [video, blue])
    assert clips.shape == (7, 4, 32, 32, 3)
    brightest = clips[:6].mean(axis=(1, 2, 3)).argmax(axis=1)
    assert brightest.tolist() == [0, 0, 0, 2, 2, 2]
    noise = clips[6]
    assert all((a != b).mean() > 0.9 for a, b in itertools.pairwise(noise))
    np.testing.assert_array_equal(clips, verification_clips(checkpoint.config, [video, blue]))
