"""INT8 and FP8 for TensorRT: from the FP16 graph to one whose large products are of 8 bits.

Both factors of such a product pass through QuantizeLinear and DequantizeLinear, from which TensorRT
makes a product of 8-bit numbers: symmetric, weights with a scale for each output channel in INT8
and one for all in FP8, activations with one for all, found on calibration clips. All else is as in
the FP16 graph. A product that 8 bits put too far off stays in FP16.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx import shape_inference as inference

from export.bundle.manifest import Parity, ProductReport
from export.calibration.histograms import METHODS, Calibration, Format, Method
from export.graph.fp16 import check_types, half_name
from export.graph.int8_cpu import large_products
from export.graph.mixed_precision_search import Switches
from export.graph.onnx_export import ExportError
from export.runtime.interface import Outputs
from export.verification.parity import LIMITS, compare

Float32 = NDArray[np.float32]

# A result that is off by more than a tenth of its own length says little.
_PRODUCT_ERROR = 0.1
# Of the room that the gate leaves: other clips may fare worse than those that are tried.
_ROOM = 0.5
# Clips that methods are compared on; each is run for every one of them, the others once.
_COMPARED = 4
# Products, or several that read the same, whose cost is measured, on the clip that fares worst.
_TRIED = 24
_ZERO = "zero_point"


class Linear(NamedTuple):
    """A product that may be of 8 bits."""

    name: str
    activation: str
    """In the float32 graph."""
    weight: Float32
    """(inputs, outputs)."""


class Quantized(NamedTuple):
    """What `export_qdq` tells of its graph."""

    products: tuple[ProductReport, ...]
    method: Method
    agreement: dict[Method, float]
    """Least cosine on the calibration clips by method, with every product rounded."""


def linears(path: Path) -> tuple[Linear, ...]:
    """The large products of a float32 graph that have a matrix of weights."""
    model = inference.infer_shapes(onnx.load(path), strict_mode=True)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return tuple(
        Linear(node.name, node.input[0], numpy_helper.to_array(weights[node.input[1]]))
        for node in large_products(model.graph, weights)
    )


def export_qdq(
    fp16: Path,
    target: Path,
    form: Format,
    candidates: Sequence[Linear],
    products: Sequence[ProductReport],
    calibration: Calibration,
    report: Callable[[str], None] = lambda step: None,
) -> Quantized:
    """Writes the INT8 or FP8 graph of an FP16 one that `export_fp16` has written.

    How much of the activations' range is covered is decided by which way agrees best with the
    float32 graph on the calibration clips. Where that is not near enough, the products that take
    most of it away stay in FP16.

    Args:
        candidates: by `linears`, of the float32 graph.
        products: what `export_fp16` said of the FP16 graph.
        calibration: of the candidates' activations.

    Raises:
        ExportError: no product may be of 8 bits, or the result is no valid graph.
    """
    halves = {product.name for product in products if product.precision == "fp16"}
    candidates = [linear for linear in candidates if linear.name in halves]
    trials = _Trials(onnx.load(fp16), form, candidates, calibration)
    found = {}
    for method in METHODS:
        report(f"comparing ranges for {form.name.upper()}: {method}")
        trials.use(method)
        if trials.fitting:
            found[method] = trials.cosines(trials.fitting, trials.some_clips(_COMPARED))
    if not found:
        raise ExportError(f"{form.name.upper()} puts every product off by more than a tenth")
    agreement = {method: min(cosines.values()) for method, cosines in found.items()}
    method = max(agreement, key=lambda each: agreement[each])
    trials.use(method)
    chosen, given_up = _near_enough(trials, found[method], report)
    model = trials.written(chosen)
    _save(model, target, form)
    check_types(model, {product.name for product in products if product.precision == "float32"})
    check_quantized(model, form, chosen)
    told = tuple(_told(product, form, chosen, trials.errors, given_up) for product in products)
    return Quantized(told, method, agreement)


class _Trials:
    """An FP16 graph with some of its products in 8 bits, on the calibration clips."""

    def __init__(
        self,
        model: ModelProto,
        form: Format,
        candidates: Sequence[Linear],
        calibration: Calibration,
    ) -> None:
        self.form = form
        self.errors: dict[str, float] = {}
        """How far each candidate is off, of its own length."""
        self._model = model
        self._names = frozenset(linear.name for linear in candidates)
        self._candidates = candidates
        self._calibration = calibration
        self._scales: dict[str, NDArray[np.float16]] = {}
        some = {linear.activation: form.scale(1.0) for linear in candidates}
        eight = quantize_products(model, form, some, self._names)
        self._switches = Switches(model, eight, self._names)

    def use(self, method: Method) -> None:
        spreads = self._calibration.spreads
        names = dict.fromkeys(linear.activation for linear in self._candidates)
        self._scales = {
            name: self.form.scale(spreads[name].largest(method, self.form)) for name in names
        }
        self.errors = {
            linear.name: _error(
                linear, spreads[linear.activation].rows, self._scales[linear.activation], self.form
            )
            for linear in self._candidates
        }

    @property
    def fitting(self) -> frozenset[str]:
        return frozenset(name for name, error in self.errors.items() if error <= _PRODUCT_ERROR)

    def groups(self, names: Collection[str]) -> list[frozenset[str]]:
        """Those that read the same numbers together, such as query, key and value; those that are
        off most first."""
        by_input: dict[str, set[str]] = {}
        for linear in self._candidates:
            if linear.name in names:
                by_input.setdefault(linear.activation, set()).add(linear.name)
        groups = [frozenset(group) for group in by_input.values()]
        return sorted(groups, key=lambda group: -max(self.errors[name] for name in group))

    def written(self, chosen: Collection[str]) -> ModelProto:
        return quantize_products(self._model, self.form, self._scales, chosen)

    def cosines(self, chosen: Collection[str], clips: Iterable[int]) -> dict[int, float]:
        """The worse one of logits and embedding with the float32 graph's answers, by clip."""
        found = {}
        scales = {half_name(name): scale for name, scale in self._scales.items()}
        for index in clips:
            frames = self._calibration.clips[index][None]
            answers = self._switches.run(frames, scales, chosen)
            reference = Outputs(*(part[index][None] for part in self._calibration.answers))
            found[index] = worst_cosine(compare(reference, answers))
        return found

    @property
    def clips(self) -> range:
        return range(len(self._calibration.clips))

    def some_clips(self, count: int) -> list[int]:
        """Of those that are counted, spread evenly."""
        last = self._calibration.counted - 1
        numbers: list[int] = np.linspace(0, last, min(count, last + 1)).round().astype(int).tolist()
        return numbers


def _near_enough(
    trials: _Trials, known: Mapping[int, float], report: Callable[[str], None]
) -> tuple[frozenset[str], dict[str, str]]:
    """The products to be of 8 bits, and why others are not that might be.

    The fewest stay in FP16, those first that by themselves cost the worst clip most, that bring it
    near enough; then the same for the clip that is the worst after that, until none is too far off.

    Args:
        known: cosines of some clips, with all that fit.
    """
    name = trials.form.name.upper()
    fitting = trials.fitting
    wanted = 1 - (1 - (LIMITS[trials.form.name].cosine or 0.0)) * _ROOM
    rest = [clip for clip in trials.clips if clip not in known]
    report(f"comparing {name} on {len(rest)} more clips")
    cosines = {**known, **trials.cosines(fitting, rest)}
    worst = min(cosines, key=lambda clip: cosines[clip])
    if cosines[worst] >= wanted:
        return fitting, {}
    groups = trials.groups(fitting)[:_TRIED]
    alone = {}
    for index, group in enumerate(groups):
        report(f"measuring what {name} costs: {index + 1} of {len(groups)}")
        alone[group] = trials.cosines(group, [worst])[worst]
    groups.sort(key=lambda group: alone[group])
    if fitting == frozenset().union(*groups):
        groups.pop()  # one is left, or there would be no such graph
    kept = 0
    while cosines[worst] < wanted and kept < len(groups):

        def near(count: int, clip: int = worst) -> bool:
            report(f"trying {name} without {count} of {len(groups)}")
            return trials.cosines(fitting.difference(*groups[:count]), [clip])[clip] >= wanted

        sizes = range(kept + 1, len(groups))
        kept = sizes[0] + bisect.bisect_left(sizes, True, key=near) if sizes else kept + 1
        cosines = trials.cosines(fitting.difference(*groups[:kept]), trials.clips)
        worst = min(cosines, key=lambda clip: cosines[clip])
    given_up = {
        product: f"{name} there alone takes the cosine to {alone[group]:.5f}"
        for group in groups[:kept]
        for product in group
    }
    report(f"keeping {len(given_up)} products from {name}")
    return fitting.difference(given_up), given_up


def _told(
    product: ProductReport,
    form: Format,
    chosen: Collection[str],
    errors: Mapping[str, float],
    given_up: Mapping[str, str],
) -> ProductReport:
    error = errors.get(product.name)
    if error is None:
        return product
    changes: dict[str, object] = {"error": error}
    if product.name in chosen:
        changes["precision"] = form.name
    elif product.name in given_up:
        changes["reason"] = given_up[product.name]
    else:
        changes["reason"] = f"in {form.name.upper()} it would be off by {error:.2g} of its length"
    return product.model_copy(update=changes)


def _error(linear: Linear, rows: Float32, scale: NDArray[np.float16], form: Format) -> float:
    """How far the product is off if both factors are rounded, relative to its length."""
    weight = linear.weight
    exact = rows @ weight
    narrow = form.rounded(weight, form.weight_scale(weight))
    length = float(np.linalg.norm(exact))
    return float(np.linalg.norm(form.rounded(rows, scale) @ narrow - exact)) / (length or 1.0)


def worst_cosine(parity: Parity) -> float:
    cosines = (parity.centred_cosine, parity.embedding_cosine)
    return min(-1.0 if cosine is None or np.isnan(cosine) else cosine for cosine in cosines)


def quantize_products(
    model: ModelProto,
    form: Format,
    scales: Mapping[str, NDArray[np.float16]],
    chosen: Collection[str],
) -> ModelProto:
    """The FP16 graph with the chosen products' factors rounded to 8 bits.

    Args:
        scales: of activations, by their name in the float32 graph.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    by_half = {half_name(name): scale for name, scale in scales.items()}
    nodes: list[NodeProto] = []
    added: dict[str, TensorProto] = {}
    seen: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.name not in chosen:
            nodes.append(node)
            continue
        activation, weight = node.input
        if activation not in seen:  # the same for query, key and value
            seen.add(activation)
            nodes += _round_activation(activation)
            added[f"{activation}_scale"] = numpy_helper.from_array(
                by_half[activation], f"{activation}_scale"
            )
        if weight not in seen:
            seen.add(weight)
            nodes.append(_widen_weight(weight, form))
            for tensor in _round_weight(weights[weight], form):
                added[tensor.name] = tensor
        rounded = NodeProto()
        rounded.CopyFrom(node)
        rounded.input[:] = [f"{activation}_dequantized", f"{weight}_dequantized"]
        nodes.append(rounded)
    added[_ZERO] = helper.make_tensor(_ZERO, form.element, [], [0])
    result = ModelProto()
    result.CopyFrom(_without_weights(model))
    read = {name for node in nodes for name in node.input}
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(tensor for name, tensor in weights.items() if name in read)
    result.graph.initializer.extend(added.values())
    return result


def _round_activation(name: str) -> list[NodeProto]:
    scale, eight, rounded = (f"{name}_{part}" for part in ("scale", "8bit", "dequantized"))
    return [
        helper.make_node("QuantizeLinear", [name, scale, _ZERO], [eight], name=f"{name}/Quantize"),
        helper.make_node(
            "DequantizeLinear", [eight, scale, _ZERO], [rounded], name=f"{name}/Dequantize"
        ),
    ]


def _widen_weight(name: str, form: Format) -> NodeProto:
    inputs = [f"{name}_{part}" for part in ("8bit", "scale", "zero")]
    axis: dict[str, Any] = {"axis": 1} if form.by_channel else {}
    return helper.make_node(
        "DequantizeLinear", inputs, [f"{name}_dequantized"], name=f"{name}/Dequantize", **axis
    )


def _round_weight(tensor: TensorProto, form: Format) -> list[TensorProto]:
    weight: Float32 = numpy_helper.to_array(tensor).astype(np.float32)
    scale = form.weight_scale(weight)
    eight = form.round(np.divide(weight, scale.astype(np.float32)))
    zero = np.zeros(scale.shape, eight.dtype)
    return [
        numpy_helper.from_array(value, f"{tensor.name}_{part}")
        for value, part in ((eight, "8bit"), (scale, "scale"), (zero, "zero"))
    ]


def _without_weights(model: ModelProto) -> ModelProto:
    """All but nodes, constants and inferred shapes: what is put back costs no second copy."""
    empty = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = model.graph
    empty.graph.CopyFrom(GraphProto(name=graph.name, input=graph.input, output=graph.output))
    return empty


def _save(model: ModelProto, target: Path, form: Format) -> None:
    try:
        onnx.save(model, target)
        onnx.checker.check_model(str(target), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the {form.name.upper()} graph is not valid: {error}") from error


def check_quantized(model: ModelProto, form: Format, chosen: Collection[str]) -> None:
    """Holds a finished graph to the rules of this file: the chosen products are of 8 bits, no other
    is, and no zero point is other than zero.

    Raises:
        ExportError: names each product that is not as it should be.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    wrong = [
        f"{node.name} is {'not ' if node.name in chosen else ''}{form.name.upper()}"
        for node in model.graph.node
        if node.op_type == "MatMul"
        and [_is_rounded(name, makers) for name in node.input] != [node.name in chosen] * 2
    ]
    wrong += list(_asymmetric(model.graph, constants, form))
    if wrong:
        raise ExportError(f"the {form.name.upper()} graph is not as it should be: {wrong}")


def _is_rounded(name: str, makers: Mapping[str, NodeProto]) -> bool:
    return name in makers and makers[name].op_type == "DequantizeLinear"


def _asymmetric(
    graph: GraphProto, constants: Mapping[str, TensorProto], form: Format
) -> Iterator[str]:
    for node in graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            zero = constants[node.input[2]]
            if zero.data_type != form.element or numpy_helper.to_array(zero).astype(float).any():
                yield f"{node.name} is not symmetric {form.name.upper()}"
