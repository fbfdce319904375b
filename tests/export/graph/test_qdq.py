"""INT8 and FP8 for TensorRT: what is rounded, that it is near, and that TensorRT takes it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.bundle.manifest import ProductReport
from export.calibration.histograms import FORMATS, Calibration, Method, record_spreads
from export.graph.fp16 import export_fp16
from export.graph.matmuls import record_magnitudes
from export.graph.onnx_export import ExportError, export_onnx
from export.graph.qdq import (
    Linear,
    Quantized,
    _Trials,
    check_quantized,
    export_qdq,
    linears,
    worst_cosine,
)
from export.graph.rewrite import rewrite
from export.pipeline import run_reference
from export.runtime.interface import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.gpu_emulation import emulate
from export.verification.parity import LIMITS, compare
from model.network.schemes import SCHEMES
from model.network.timesformer import TimeSformer
from tests.export.conftest import EVERY_SCHEME
from tests.model.conftest import random_frames, random_model, tiny_config

KINDS = tuple(FORMATS)


class Exported(NamedTuple):
    model: TimeSformer
    clips: NDArray[np.uint8]
    linears: tuple[Linear, ...]
    calibration: Calibration
    fp16: Path
    products: tuple[ProductReport, ...]

    def quantize(self, kind: str, path: Path, report: Any = lambda step: None) -> Quantized:
        return export_qdq(
            *(self.fp16, path, FORMATS[kind], self.linears, self.products, self.calibration),
            report,
        )


class Case:
    def __init__(self, exported: Exported, kind: str) -> None:
        self.exported, self.kind = exported, kind
        self.model, self.clips, self.fp16 = exported.model, exported.clips, exported.fp16
        self.path = exported.fp16.with_name(f"{kind}.onnx")
        self.quantized = exported.quantize(kind, self.path)

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.path).graph

    def of(self, precision: str) -> set[str]:
        return {each.name for each in self.quantized.products if each.precision == precision}


Maker = Callable[..., Case]
Change = Callable[[TimeSformer], None]


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Exports a network once, and each kind of it once."""

    @functools.cache
    def export(scheme: str, change: Change | None) -> Exported:
        return _export(tmp_path_factory.mktemp("qdq"), scheme, change)

    @functools.cache
    def make(scheme: str, kind: str, change: Change | None = None) -> Case:
        return Case(export(scheme, change), kind)

    return make


def _export(folder: Path, scheme: str, change: Change | None) -> Exported:
    model = random_model(tiny_config(scheme, embed_dim=48, num_heads=4))
    if change is not None:
        with torch.no_grad():
            change(model)
    clips = random_frames(model.config, batch=4).numpy()
    float32, fp16 = folder / "model.onnx", folder / "model.fp16.onnx"
    export_onnx(rewrite(model), float32)
    products = export_fp16(float32, fp16, record_magnitudes(float32, clips))
    found = linears(float32)
    names = dict.fromkeys(linear.activation for linear in found)
    calibration = record_spreads(float32, names, clips)
    return Exported(model, clips, found, calibration, fp16, products)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, make_case: Maker) -> Case:
    return make_case("divided_space_time", request.param)


def evaluate(graph: onnx.ModelProto, clips: NDArray[np.uint8]) -> Outputs:
    answers = ReferenceEvaluator(graph).run(None, {"frames": clips})
    return Outputs(*(answer.astype(np.float32) for answer in answers))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", EVERY_SCHEME)
def test_answers_stay_near_the_networks_in_every_scheme(
    scheme: str, kind: str, make_case: Maker
) -> None:
    """By ONNX's reference evaluator, which rounds for real."""
    case = make_case(scheme, kind)
    reference = run_reference(case.model, case.clips)
    parity = compare(reference, evaluate(onnx.load(case.path), case.clips), LIMITS[kind])
    assert parity.passed, parity
    halves = compare(reference, evaluate(onnx.load(case.fp16), case.clips))
    assert parity.max_difference > 2 * halves.max_difference, "else nothing was rounded to 8 bits"


def test_the_emulation_rounds_as_the_reference_evaluator_does(case: Case) -> None:
    rounded = evaluate(onnx.load(case.path), case.clips).logits
    runtime = OnnxRuntime(emulate(onnx.load(case.path)), cuda=False)
    emulated = runtime.run(case.clips).logits
    exact = run_reference(case.model, case.clips).logits
    ratio = np.abs(emulated - exact).mean() / np.abs(rounded - exact).mean()
    assert 1 / 2 < ratio < 2


def test_the_large_products_are_of_8_bits_and_no_other(case: Case) -> None:
    config = case.model.config
    before = len(SCHEMES[config.attention_type].before)
    whole = config.depth - 1
    candidates = whole * (4 * before + 6) + 4 * before
    eight = case.of(FORMATS[case.kind].name)
    given_up = [each for each in case.quantized.products if each.error is not None and each.reason]
    assert len(eight) + len(given_up) == candidates
    assert len(eight) > candidates / 2
    makers = {name: node for node in case.graph.node for name in node.output}
    for node in case.graph.node:
        if node.op_type == "MatMul":
            kinds = {makers[name].op_type if name in makers else "" for name in node.input}
            assert (kinds == {"DequantizeLinear"}) == (node.name in eight), node.name


def test_scales_are_symmetric_and_of_weights_as_the_format_has_them(case: Case) -> None:
    """INT8: one for each output channel; FP8: one for all, or TensorRT multiplies in FP16."""
    constants = {tensor.name: tensor for tensor in case.graph.initializer}
    element = FORMATS[case.kind].element
    rounded = []
    for node in case.graph.node:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        if node.op_type == "QuantizeLinear":
            rounded.append(node.input[0])
        scale, zero = (constants[name] for name in node.input[1:])
        assert scale.data_type == TensorProto.FLOAT16
        assert zero.data_type == element
        assert not numpy_helper.to_array(zero).astype(float).any()
        if node.input[0] in constants:
            weight = constants[node.input[0]]
            assert weight.data_type == element
            assert list(scale.dims) == ([weight.dims[1]] if case.kind == "int8-qdq" else [])
            assert list(zero.dims) == list(scale.dims)
        else:
            assert list(scale.dims) == []
    assert len(rounded) == len(set(rounded)), "query, key and value share one rounding"
    assert case.path.stat().st_size < 0.8 * case.fp16.stat().st_size


def test_the_way_that_agrees_best_is_taken(case: Case) -> None:
    agreement = case.quantized.agreement
    assert set(agreement) == {"max", "percentile", "mse"}
    assert agreement[case.quantized.method] == max(agreement.values())


def outlier_channel(model: TimeSformer) -> None:
    """One input of one product reaches 300 times the others: 8 bits leave nothing of them."""
    mlp = model.blocks[0].mlp
    mlp.fc1.weight[7] *= 300
    mlp.fc1.bias[7] = 30
    mlp.fc2.weight[:, 7] *= 1e-3


def test_a_product_that_8_bits_spoil_stays_fp16_and_the_report_says_why(make_case: Maker) -> None:
    case = make_case("divided_space_time", "int8-qdq", outlier_channel)
    (product,) = (each for each in case.quantized.products if "fc2" in each.name and each.reason)
    assert product.precision == "fp16"
    assert product.error is not None
    assert product.error > 0.01
    assert product.reason
    reference = run_reference(case.model, case.clips)
    parity = compare(reference, evaluate(onnx.load(case.path), case.clips), LIMITS["int8-qdq"])
    assert parity.passed, parity


def test_products_are_kept_until_the_answers_are_near_enough(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a limit that all of them together miss, those that cost most stay in FP16."""
    form = FORMATS[case.kind]
    strict = 1 - (1 - max(case.quantized.agreement.values())) / 2
    limits = {form.name: LIMITS[form.name]._replace(cosine=1 - 2 * (1 - strict))}
    monkeypatch.setattr("export.graph.qdq.LIMITS", limits)
    steps: list[str] = []
    quantized = case.exported.quantize(case.kind, tmp_path / "q.onnx", steps.append)
    kept = [each for each in quantized.products if each.reason and each.error is not None]
    still = [each for each in quantized.products if each.precision == form.name]
    assert kept
    assert still
    assert all(f"{form.name.upper()} there alone" in str(each.reason) for each in kept)
    assert f"keeping {len(kept)} products from {form.name.upper()}" in steps
    runtime = OnnxRuntime(emulate(onnx.load(tmp_path / "q.onnx")), cuda=False)
    parity = compare(case.exported.calibration.answers, runtime.run(case.clips))
    assert min(parity.centred_cosine or 0, parity.embedding_cosine or 0) >= strict


@pytest.mark.parametrize("method", ["max", "percentile"])
def test_what_is_tried_answers_bit_for_bit_as_what_is_then_written(
    case: Case, method: Method
) -> None:
    """Switched by inputs in one session, or a graph of its own: the same roundings."""
    exported, form = case.exported, FORMATS[case.kind]
    trials = _Trials(onnx.load(case.fp16), form, exported.linears, exported.calibration)
    trials.use(method)
    names = sorted(trials.fitting)
    for chosen in (names, names[::2], names[:1]):
        runtime = OnnxRuntime(emulate(trials.written(chosen)), cuda=False)
        for clip, told in trials.cosines(chosen, trials.clips).items():
            reference = Outputs(*(part[clip][None] for part in exported.calibration.answers))
            answers = runtime.run(case.clips[clip][None])
            assert told == worst_cosine(compare(reference, answers)) < 1


def test_the_same_network_becomes_the_same_graph_each_time(case: Case, tmp_path: Path) -> None:
    again = case.exported.quantize(case.kind, tmp_path / "again.onnx")
    assert again == case.quantized
    assert (tmp_path / "again.onnx").read_bytes() == case.path.read_bytes()


def test_a_clip_that_fares_worse_than_those_that_are_compared_keeps_products(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranges are chosen on some clips; what stays in FP16 is decided on all."""
    form = FORMATS[case.kind]
    trials = _Trials(onnx.load(case.fp16), form, case.exported.linears, case.exported.calibration)
    trials.use(case.quantized.method)
    cosines = trials.cosines(trials.fitting, trials.clips)
    worst = min(cosines, key=lambda clip: cosines[clip])
    order = [*(clip for clip in cosines if clip != worst), worst]
    counted = case.exported.calibration
    calibration = dataclasses.replace(
        counted,
        clips=counted.clips[order],
        counted=len(order) - 1,
        answers=Outputs(*(part[order] for part in counted.answers)),
    )
    others = min(cosines[clip] for clip in order[:-1])
    limit = 2 * (cosines[worst] + others) / 2 - 1  # half its room lies between the two
    limits = {form.name: LIMITS[form.name]._replace(cosine=limit)}
    monkeypatch.setattr("export.graph.qdq.LIMITS", limits)
    monkeypatch.setattr("export.graph.qdq.METHODS", (case.quantized.method,))
    quantized = export_qdq(
        *(case.fp16, tmp_path / "q.onnx", form, case.exported.linears),
        *(case.exported.products, calibration),
    )
    assert any("there alone" in str(each.reason) for each in quantized.products)


class TestChecks:
    """The pass that the exporter always ends with."""

    def test_a_product_that_is_not_rounded_is_found(self, case: Case) -> None:
        model = onnx.load(case.path)
        makers = {name: node for node in model.graph.node for name in node.output}
        product = next(
            node
            for node in model.graph.node
            if node.op_type == "MatMul" and makers[node.input[0]].op_type == "DequantizeLinear"
        )
        quantize = makers[makers[product.input[0]].input[0]]
        product.input[0] = quantize.input[0]
        with pytest.raises(ExportError, match=f"{product.name} is not"):
            check_quantized(model, FORMATS[case.kind], case.of(FORMATS[case.kind].name))

    def test_a_product_that_should_not_be_rounded_is_found(self, case: Case) -> None:
        form = FORMATS[case.kind]
        chosen = sorted(case.of(form.name))
        with pytest.raises(ExportError, match=f"{chosen[0]} is {form.name.upper()}"):
            check_quantized(onnx.load(case.path), form, chosen[1:])

    def test_a_zero_point_that_is_not_zero_is_found(self, case: Case) -> None:
        model = onnx.load(case.path)
        zero = next(t for t in model.graph.initializer if t.name == "zero_point")
        zero.CopyFrom(onnx.helper.make_tensor("zero_point", zero.data_type, [], [3]))
        with pytest.raises(ExportError, match="is not symmetric"):
            check_quantized(model, FORMATS[case.kind], case.of(FORMATS[case.kind].name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["divided_space_time", "space_only"])
def test_tensorrt_parses_and_builds_it(
    scheme: str, kind: str, make_case: Maker, tmp_path: Path
) -> None:
    """TensorRT-RTX, for real and without a GPU: every product's result is FP16, and as many
    roundings are in the network as in the graph."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from export.tensorrt.builder import BuildJob, build_plan

    case = make_case(scheme, kind)
    form = FORMATS[kind]
    key = {
        "gpu": "NVIDIA L4",
        "compute_capability": "8.9",
        "tensorrt": "11.4",
        "precision": form.name,
        "batches": (1, 4),
    }
    job = BuildJob(
        graph=case.path,
        graph_sha256=hashlib.sha256(case.path.read_bytes()).hexdigest(),
        folder=tmp_path,
        key=key,
        module="tensorrt_rtx_bindings",
    )
    plan = build_plan(job)
    assert f"_{form.name}_" in plan.path.name
    network = plan.facts.network
    rounded = sum(node.op_type == "QuantizeLinear" for node in case.graph.node)
    assert sum(network["QUANTIZE"].values()) == rounded > 0
    assert set(network["NORMALIZATION"]) == set(network["SOFTMAX"]) == {"FLOAT"}
    assert network["MATRIX_MULTIPLY"]["HALF"] >= len(case.of(form.name))
