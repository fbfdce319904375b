"""FP16: what is in which type, and that no weights make the answers wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.bundle.manifest import ProductReport
from export.graph.fp16 import check_types, export_fp16
from export.graph.matmuls import record_magnitudes
from export.graph.onnx_export import INPUT_NAME, ExportError, export_onnx
from export.graph.rewrite import rewrite
from export.runtime.interface import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.gpu_emulation import emulate
from export.verification.parity import FP16, compare
from export.verification.torch_reference import run_reference
from model.network.timesformer import TimeSformer
from tests.export.conftest import EVERY_SCHEME
from tests.model.conftest import random_frames, random_model, tiny_config

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
Hazard = Callable[[TimeSformer], None]


def outliers_in_the_residual_stream(model: TimeSformer) -> None:
    """Two channels of 1e5 and -7e4, as large models have them."""
    model.pos_embed[..., 3] = 1e5
    model.pos_embed[..., 7] = -7e4
    look_past(model, [3, 7])


def outlier_weights(model: TimeSformer) -> None:
    """1e5 and more, on an input that is always small."""
    mlp = model.blocks[0].mlp
    mlp.fc1.weight[5] *= 1e-5
    mlp.fc1.bias[5] = 0
    mlp.fc2.weight[:, 5] *= 2e6


def a_product_that_overflows(model: TimeSformer) -> None:
    """The MLP writes up to 1e6 into a channel of the residual stream; its factors all fit."""
    model.blocks[0].mlp.fc2.weight[4] = 1.5e4
    look_past(model, [4], after="blocks.0.")


def look_past(model: TimeSformer, channels: list[int], after: str = "nothing") -> None:
    """The norms weigh outliers down and all else up, as in trained networks."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight") and not name.startswith(after):
            parameter.mul_(1e4)
            parameter[channels] = 0.01


HAZARDS = (outliers_in_the_residual_stream, outlier_weights, a_product_that_overflows)


class Case(NamedTuple):
    model: TimeSformer
    clips: NDArray[np.uint8]
    float32: Path
    fp16: Path
    reports: tuple[ProductReport, ...]

    @property
    def kept(self) -> set[str]:
        return {report.name for report in self.reports if report.precision == "float32"}

    @property
    def reference(self) -> Outputs:
        return run_reference(self.model, self.clips)


Maker = Callable[..., Case]


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Exports a network with hazards in it; the same one once."""

    @functools.cache
    def make(attention_type: str, *hazards: Hazard) -> Case:
        return _make_case(tmp_path_factory.mktemp("fp16"), attention_type, hazards)

    return make


def _make_case(folder: Path, attention_type: str, hazards: Collection[Hazard]) -> Case:
    torch.manual_seed(0)
    # One block is exported in half the time of two, but outliers leave too little of its answers.
    depth = 2 if not hazards or outliers_in_the_residual_stream in hazards else 1
    model = random_model(tiny_config(attention_type, depth=depth))
    with torch.no_grad():
        for hazard in hazards:
            hazard(model)
    clips = random_frames(model.config, batch=3).numpy()
    float32, fp16 = folder / "model.onnx", folder / "model.fp16.onnx"
    export_onnx(rewrite(model), float32)
    reports = export_fp16(float32, fp16, record_magnitudes(float32, clips))
    return Case(model, clips, float32, fp16, reports)


@pytest.fixture(scope="module", params=["divided_space_time", "space_only"])
def scheme(request: pytest.FixtureRequest, make_case: Maker) -> Case:
    """A network with nothing special about it."""
    return make_case(request.param)


def evaluate(graph: onnx.ModelProto, clips: NDArray[np.uint8]) -> Outputs:
    """Rounds wherever the graph says so, as no ONNX Runtime on a CPU does by default."""
    with np.errstate(all="ignore"):
        answers = ReferenceEvaluator(graph).run(None, {INPUT_NAME: clips})
    return Outputs(*(answer.astype(np.float32) for answer in answers))


def run_emulated(graph: Path, clips: NDArray[np.uint8]) -> Outputs:
    return OnnxRuntime(emulate(onnx.load(graph)), cuda=False).run(clips)


def cast_blankly(path: Path) -> onnx.ModelProto:
    """What a converter does that looks at no number: every float becomes FP16."""
    model = onnx.load(path)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT:
            with np.errstate(over="ignore"):
                halves = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(halves, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == FLOAT:
                attribute.i = HALF
    for output in graph.output:
        output.type.tensor_type.elem_type = HALF
    del graph.value_info[:]
    return model


def test_answers_are_the_networks(scheme: Case) -> None:
    parity = compare(scheme.reference, evaluate(onnx.load(scheme.fp16), scheme.clips), FP16)
    assert parity.passed, parity
    assert parity.max_difference > 1e-6  # else nothing was rounded


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.__name__)
def test_each_hazard_breaks_a_blanket_cast_and_not_ours(hazard: Hazard, make_case: Maker) -> None:
    case = make_case("divided_space_time", hazard)
    reference = case.reference
    assert reference.logits.std(axis=0).max() > 0.01  # else equality would say little
    assert not compare(reference, evaluate(cast_blankly(case.float32), case.clips), FP16).passed
    parity = compare(reference, evaluate(onnx.load(case.fp16), case.clips), FP16)
    assert parity.passed, parity


@pytest.mark.parametrize("attention_type", EVERY_SCHEME)
def test_all_hazards_together_in_every_scheme(attention_type: str, make_case: Maker) -> None:
    case = make_case(attention_type, *HAZARDS)
    reference = case.reference
    assert not compare(reference, evaluate(cast_blankly(case.float32), case.clips), FP16).passed
    parity = compare(reference, evaluate(onnx.load(case.fp16), case.clips), FP16)
    assert parity.passed, parity
    assert compare(reference, run_emulated(case.fp16, case.clips), FP16).passed


def test_the_emulation_shows_on_a_cpu_what_overflows(make_case: Maker, tmp_path: Path) -> None:
    """ONNX Runtime by itself does not: the gate would be blind."""
    case = make_case("divided_space_time", a_product_that_overflows)
    blind = dict.fromkeys(record_magnitudes(case.float32, case.clips), 1.0)
    wrong = tmp_path / "model.fp16.onnx"
    export_fp16(case.float32, wrong, blind)
    assert not compare(case.reference, evaluate(onnx.load(wrong), case.clips), FP16).passed
    assert not compare(case.reference, run_emulated(wrong, case.clips), FP16).passed
    assert compare(case.reference, OnnxRuntime(wrong, cuda=False).run(case.clips), FP16).passed


def test_the_emulation_rounds_as_the_reference_evaluator_does(scheme: Case) -> None:
    rounded = evaluate(onnx.load(scheme.fp16), scheme.clips).logits
    emulated = run_emulated(scheme.fp16, scheme.clips).logits
    reference = scheme.reference.logits
    ratio = np.abs(emulated - reference).mean() / np.abs(rounded - reference).mean()
    assert 1 / 3 < ratio < 3


class TestWhatStaysInFloat32:
    def test_nothing_where_all_numbers_fit(self, scheme: Case) -> None:
        assert scheme.kept == set()
        assert all(report.reason is None for report in scheme.reports)

    def test_a_product_whose_weights_are_too_large(self, make_case: Maker) -> None:
        case = make_case("divided_space_time", outlier_weights)
        first, second = (each for each in case.reports if each.reason)
        assert (first.name, first.precision) == ("blocks.0.mlp.fc1/MatMul", "float32")
        assert first.reason
        assert "its weights would be off" in first.reason
        assert (second.name, second.precision) == ("blocks.0.mlp.fc2/MatMul", "float32")
        assert second.inputs[1] > 1e5
        assert second.reason
        assert second.reason.endswith("is beyond 65504 / 4")

    def test_a_product_whose_result_is_too_large(self, make_case: Maker) -> None:
        case = make_case("divided_space_time", a_product_that_overflows)
        (report,) = (each for each in case.reports if each.name == "blocks.0.mlp.fc2/MatMul")
        assert report.reason
        assert max(report.inputs) < 65504 / 4 < report.output

    def test_a_product_within_a_factor_of_four_of_overflow(self, scheme: Case) -> None:
        magnitudes = dict(record_magnitudes(scheme.float32, scheme.clips))
        products = [node for node in onnx.load(scheme.float32).graph.node
                    if node.op_type == "MatMul"]  # fmt: skip
        magnitudes[products[0].output[0]] = 65504 / 4
        magnitudes[products[-1].output[0]] = 65504 / 4 + 1
        reports = export_fp16(scheme.float32, scheme.fp16.with_name("near.onnx"), magnitudes)
        assert [report.name for report in reports if report.reason] == [products[-1].name]

    def test_a_product_whose_weights_are_too_small(self, make_case: Maker) -> None:
        def small(model: TimeSformer) -> None:
            model.blocks[0].mlp.fc2.weight[2] *= 1e-6

        case = make_case("divided_space_time", small)
        (report,) = (each for each in case.reports if each.reason)
        assert report.name == "blocks.0.mlp.fc2/MatMul"
        assert report.reason
        assert "its weights would be off by" in report.reason


class TestTypes:
    """The pass that the exporter always ends with."""

    def test_products_are_fp16_and_all_that_decides_is_float32(self, scheme: Case) -> None:
        graph = onnx.shape_inference.infer_shapes(onnx.load(scheme.fp16)).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        values = (*graph.value_info, *graph.output, *graph.input)
        types.update({value.name: value.type.tensor_type.elem_type for value in values})
        for node in graph.node:
            kinds = {types[name] for name in (*node.input, *node.output)} & {FLOAT, HALF}
            if node.op_type == "MatMul":
                assert kinds == {HALF}, node.name
            if node.op_type in {"LayerNormalization", "Softmax", "Gemm", "ReduceMean"}:
                assert kinds == {FLOAT}, node.name
            if node.op_type == "Cast" and INPUT_NAME in node.input:
                assert types[node.output[0]] == HALF
        constants = {tensor.name for tensor in graph.initializer}
        residual = [node for node in graph.node
                    if node.op_type == "Add" and constants.isdisjoint(node.input)]  # fmt: skip
        assert residual
        assert all(types[name] == FLOAT for node in residual for name in node.input)

    def test_weights_of_products_are_stored_in_fp16_alone(self, scheme: Case) -> None:
        assert scheme.fp16.stat().st_size < 0.75 * scheme.float32.stat().st_size

    @pytest.mark.parametrize("operator", ["LayerNormalization", "Softmax", "Gemm", "Add"])
    def test_an_operator_that_became_fp16_is_found(self, scheme: Case, operator: str) -> None:
        model = onnx.load(scheme.fp16)
        graph = model.graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        node = next(
            node
            for node in graph.node
            if node.op_type == operator
            and not (operator == "Add" and any(name in constants for name in node.input))
        )
        (output,) = node.output
        at = list(graph.node).index(node)
        halves = {name: f"{name}_wrong" for name in dict.fromkeys((*node.input, output))}
        for name in node.input:
            graph.node.insert(at, helper.make_node("Cast", [name], [halves[name]], to=HALF))
        at += len(node.input)
        graph.node.insert(at + 1, helper.make_node("Cast", [halves[output]], [output], to=FLOAT))
        for names in (graph.node[at].input, graph.node[at].output):
            names[:] = [halves[name] for name in names]
        with pytest.raises(ExportError, match=f"{operator} {node.name} reads FLOAT16, not FLOAT"):
            check_types(model)

    def test_a_product_that_stayed_float32_without_being_kept_is_found(self, scheme: Case) -> None:
        with pytest.raises(ExportError, match="MatMul patch_embed/MatMul reads FLOAT, not FLOAT16"):
            check_types(onnx.load(scheme.float32))

    def test_a_residual_stream_that_passes_through_fp16_is_found(self, scheme: Case) -> None:
        model = onnx.load(scheme.fp16)
        graph = model.graph
        norm = next(node for node in graph.node if node.op_type == "LayerNormalization")
        at = list(graph.node).index(norm)
        name = norm.input[0]
        graph.node.insert(at, helper.make_node("Cast", ["half"], ["back"], name="back", to=FLOAT))
        graph.node.insert(at, helper.make_node("Cast", [name], ["half"], to=HALF))
        graph.node[at + 2].input[0] = "back"
        with pytest.raises(ExportError, match="half is rounded to FP16 and back by Cast back"):
            check_types(model)

    def test_an_unknown_operator_is_refused(self, scheme: Case) -> None:
        model = onnx.load(scheme.fp16)
        node = next(node for node in model.graph.node if node.op_type == "Softmax")
        node.op_type = "LogSoftmax"
        with pytest.raises(ExportError, match="nothing is known of: LogSoftmax"):
            check_types(model)
