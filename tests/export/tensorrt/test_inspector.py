"""What an engine's inspector tells. Only a GPU loads an engine: here its answers are made up, and
look as TensorRT's do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.runtime.plans import PlanError, layers_file, plans_in
from export.tensorrt import builder as tensorrt
from export.tensorrt.inspector import by_type, in_words, missing_bits, read_layers
from tests.export.tensorrt.test_builder import Loading, built_here, colours, folder, job, key

__all__ = ["colours", "folder"]  # fixtures

INSPECTED = """{"Layers": [
    {"Name": "a", "LayerType": "gemm", "Inputs": [{"Name": "i", "DataType": "Half"}],
     "Outputs": [{"Name": "x", "DataType": "Half"}]},
    {"Name": "b", "LayerType": "gemm", "Inputs": [{"Name": "x", "DataType": "Int8"}],
     "Outputs": [{"Name": "y", "DataType": "Half"}]},
    {"Name": "c", "LayerType": "fusion", "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_tn",
     "Outputs": [{"Name": "z", "DataType": "Half"}]},
    {"Name": "d", "LayerType": "kgen", "Inputs": [{"Name": "f", "Format/Datatype": "UInt8"}],
     "Outputs": [{"Name": "w", "Format/Datatype": "Row major linear FP32 format"}]},
    {"Name": "e", "LayerType": "signal", "Outputs": []},
    "a name alone"], "Bindings": ["frames"]}"""
COUNTED = {
    "fusion": {"Half": 1},
    "gemm": {"Half": 2},
    "kgen": {"Row major linear FP32 format": 1},
    "signal": {"unknown": 1},
    "unnamed": {"unknown": 1},
}


def layer(kernel: str = "", kind: str = "gemm", **inputs: str) -> dict[str, Any]:
    given = [{"Name": name, "Format/Datatype": type_} for name, type_ in inputs.items()]
    return {"Name": "/blocks.0/fc1", "LayerType": kind, "Inputs": given, "TacticName": kernel}


def products(*layers: dict[str, Any]) -> dict[str, int]:
    return read_layers(json.dumps({"Layers": layers})).products


class TestReading:
    def test_layers_are_counted_by_kind_and_by_the_type_of_what_they_give(self) -> None:
        found = read_layers(INSPECTED)
        assert found.layers == COUNTED
        assert by_type(found.layers) == {"FP16": 3, "unknown": 2, "FP32": 1}

    def test_products_are_counted_by_what_they_compute_in(self) -> None:
        found = read_layers(INSPECTED)
        assert found.products == {"FP16": 2, "INT8": 1}
        assert in_words(found.products) == "INT8 1, FP16 2"

    @pytest.mark.parametrize(
        ("computed", "told"),
        [
            ("FP8", layer(x="FP8", bias="Half")),
            ("FP8", layer("sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x64")),
            ("INT8", layer("sm80_xmma_gemm_i8f32_i8i32_f32_by_fusion_tactic", "fusion")),
            ("INT8", layer(x="Thirty-two wide channel vectorized row major Int8 format.")),
            ("FP16", layer(x="Half", residual="Float")),
            ("FP16", layer("_gemm_mha_v2", "kgen", q="Row major linear FP16 format")),
            ("FP32", layer(x="Float")),
            ("TF32", layer("sm80_xmma_gemm_tf32f32_tf32f32_f32", x="Float")),
            ("unknown", layer()),
        ],
    )
    def test_a_product_computes_in_the_narrowest_type_that_goes_in(
        self, computed: str, told: dict[str, Any]
    ) -> None:
        assert products(told) == {computed: 1}

    def test_what_rounds_or_casts_is_no_product(self) -> None:
        assert products(layer("__myl_MulRouClaCas", "kgen", x="Int8"), layer("", "Reformat")) == {}

    def test_line_ends_in_names_are_taken(self) -> None:
        assert read_layers('{"Layers": [{"Name": "a\\nb", "LayerType": "x"}]}'.replace("\\n", "\n"))

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"Layers": 3}'])
    def test_what_tells_of_no_layers_is_an_error(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"Expecting|no list of layers"):
            read_layers(text)

    @pytest.mark.parametrize("shape", [None, 3, "x", ["x"], [None], [{}], {}])
    def test_tensors_of_another_shape_are_unknown(self, shape: object) -> None:
        told = {"LayerType": "gemm", "Inputs": shape, "Outputs": shape, "TacticName": None}
        found = read_layers(json.dumps({"Layers": [told]}))
        assert found.layers == {"gemm": {"unknown": 1}}
        assert found.products == {"unknown": 1}


@pytest.mark.parametrize(
    ("precision", "counts", "missing"),
    [
        ("fp8", {"FP16": 72, "FP32": 2}, "no matrix product computes in FP8 (FP16 72, FP32 2)"),
        ("int8", {}, "no matrix product is named"),
        ("fp8", {"FP8": 1, "FP16": 70}, None),
        ("int8", {"INT8": 2}, None),
        ("fp16", {"FP16": 3}, None),
        ("float32", {}, None),
    ],
)
def test_a_plan_without_one_product_in_its_8_bits_is_warned_of(
    precision: str, counts: dict[str, int], missing: str | None
) -> None:
    told = missing_bits(precision, counts)
    assert told is missing is None or str(missing) in str(told)


def engine(answer: object) -> Any:
    """An engine whose inspector answers so, or raises it."""

    def tell(form: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    inspector = SimpleNamespace(get_engine_information=tell)
    return SimpleNamespace(create_engine_inspector=lambda: inspector)


class TestBesideThePlan:
    @pytest.mark.parametrize("precision", ["int8", "fp8"])
    def test_all_that_the_inspector_says_is_kept_counted_and_warned_of(
        self, colours: Path, folder: Path, precision: str
    ) -> None:
        wanted = job(colours, folder, key=key(precision=precision))
        facts = built_here(Loading(engine(INSPECTED)), wanted)
        assert facts.engine == COUNTED
        assert facts.products == {"FP16": 2, "INT8": 1}
        assert ["computes in FP8" in each for each in facts.warnings] == [True] * (
            precision == "fp8"
        )
        assert layers_file(wanted.plan).read_text() == INSPECTED

    @pytest.mark.parametrize(
        "answer",
        ["{", "[]", '{"Layers": null}', UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no start")],
    )
    def test_an_answer_that_cannot_be_read_is_a_warning_and_the_plan_stays(
        self, colours: Path, folder: Path, answer: object
    ) -> None:
        wanted = job(colours, folder, key=key(precision="fp8"))
        facts = built_here(Loading(engine(answer)), wanted)
        assert (facts.engine, facts.products) == (None, None)
        (warning,) = facts.warnings
        assert warning.startswith("what the engine inspector says cannot be read: ")

    def test_a_plan_that_cannot_be_loaded_again_is_an_error(
        self, colours: Path, folder: Path
    ) -> None:
        module: Any = Loading(None)
        log = SimpleNamespace(why=lambda: "wrong version")
        wanted = job(colours, folder, module="tensorrt")
        with pytest.raises(PlanError, match=r"cannot load the plan .*: wrong version"):
            tensorrt._inspect(module, wanted, b"plan", log)
        assert list(plans_in(folder)) == []
