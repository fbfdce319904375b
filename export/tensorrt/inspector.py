"""What TensorRT made of a network, as its engine inspector tells: layers by kind and type, and in
how many bits the matrix products compute.

TensorRT may compute a product in more bits than the graph says, where it has no kernel for fewer,
and says so nowhere else.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# What the inspector calls a type, in short and in long: `Half`, `Row major linear FP16 format`.
# The narrowest first: a product computes in the narrowest type that goes into it.
_TYPES = {
    "FP4": r"fp4|e2m1|float4_e2m1fn",
    "FP8": r"fp8|e4m3|e5m2|float8_e4m3fn",
    "INT8": r"int8|i8",
    "FP16": r"half|fp16|f16|float16",
    "BF16": r"bf16|bfloat16",
    "TF32": r"tf32",
    "FP32": r"float|fp32|f32|float32",
}
_WORDS = {
    name: re.compile(rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])") for name, words in _TYPES.items()
}
# The first factor in the name of a kernel, such as `sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n`.
_KERNEL = re.compile(rf"gemm_({'|'.join(_TYPES.values())})")
_PRODUCT = re.compile(r"gemm|matmul|matrix_?multiply|mha|convolution")
_EIGHT_BITS = {"fp8": "FP8", "int8": "INT8"}
UNKNOWN = "unknown"


class Inspected(NamedTuple):
    """What an engine consists of."""

    layers: dict[str, dict[str, int]]
    """How many of each kind give each type, in the inspector's own words."""
    products: dict[str, int]
    """How many matrix products compute in each type: keys of `_TYPES`, or `unknown`."""


def read_layers(text: str) -> Inspected:
    """What the inspector's answer in JSON says.

    Raises:
        ValueError: it is no JSON, or says nothing of layers.
    """
    told = json.loads(text, strict=False)  # names of layers may have line ends in them
    layers = told.get("Layers") if isinstance(told, dict) else None
    if not isinstance(layers, list):
        raise ValueError("it has no list of layers")
    counted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    products: Counter[str] = Counter()
    for layer in layers:
        # A plan that tells names alone has strings here.
        facts = layer if isinstance(layer, dict) else {}
        kind = str(facts.get("LayerType") or "unnamed")
        counted[kind][next(_types(facts, "Outputs"), UNKNOWN)] += 1
        kernel = str(facts.get("TacticName") or "")
        if _PRODUCT.search(f"{kind} {kernel}".lower()):
            products[_computes_in(facts, kernel)] += 1
    return Inspected({kind: dict(counted[kind]) for kind in sorted(counted)}, dict(products))


def by_type(layers: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Layers by the type of what they give, the most frequent first."""
    counted: Counter[str] = Counter()
    for given in layers.values():
        for words, count in given.items():
            counted[_named(words)] += count
    return dict(counted.most_common())


def in_words(counts: Mapping[str, int]) -> str:
    """Such as `FP8 48, FP16 14`, the narrowest type first."""
    order = [*_TYPES, UNKNOWN]
    ranked = sorted(counts, key=lambda name: order.index(name) if name in order else len(order))
    return ", ".join(f"{name} {counts[name]}" for name in ranked)


def missing_bits(precision: str, products: Mapping[str, int]) -> str | None:
    """A warning if a plan for 8 bits has not one matrix product that computes in them."""
    wanted = _EIGHT_BITS.get(precision)
    if wanted is None or products.get(wanted):
        return None
    found = in_words(products) or "no matrix product is named"
    return (
        f"no matrix product computes in {wanted} ({found}), though the graph says so: measure "
        "whether the plan is any faster than one in FP16"
    )


def _types(facts: Mapping[str, Any], which: str) -> Iterator[str]:
    """The types of a layer's `Inputs` or `Outputs`, in the inspector's words."""
    tensors = facts.get(which)
    for tensor in tensors if isinstance(tensors, list) else ():
        if isinstance(tensor, dict):
            # TensorRT 10 has both in one, such as `Row major linear FP16 format`.
            yield str(tensor.get("DataType") or tensor.get("Format/Datatype") or UNKNOWN)


def _computes_in(facts: Mapping[str, Any], kernel: str) -> str:
    given = {_named(words) for words in _types(facts, "Inputs")}
    if first := _KERNEL.search(kernel.lower()):
        given.add(_named(first[1]))
    return _narrowest(given)


def _narrowest(names: Iterable[str]) -> str:
    return min((name for name in names if name in _TYPES), key=list(_TYPES).index, default=UNKNOWN)


def _named(words: str) -> str:
    """The type in what the inspector says, which may be a sentence; else its words as they are."""
    return next((name for name, word in _WORDS.items() if word.search(words.lower())), words)
