"""How numbers are counted, and what of their range 8 bits are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from export.calibration.histograms import (
    FORMATS,
    METHODS,
    Format,
    Spread,
    SpreadRecorder,
    count,
    record_spreads,
)
from export.calibration.recorder import record
from export.graph.onnx_export import export_onnx
from export.graph.qdq import linears
from export.graph.rewrite import rewrite
from tests.export.conftest import EVERY_SCHEME
from tests.model.conftest import random_frames, random_model, tiny_config

INT8, FP8 = FORMATS["int8-qdq"], FORMATS["fp8"]


def spread(values: np.ndarray) -> Spread:
    values = values.astype(np.float32)
    return Spread(count(values), values[:1])


def mean_square_error(values: np.ndarray, largest: float, form: Format) -> float:
    off = form.rounded(values.astype(np.float32), form.scale(largest)) - values
    return float(np.mean(off**2))


def test_numbers_are_counted_once_whatever_their_sign_and_size() -> None:
    values = np.array([0, -0.0, 1, -1, 1e-30, 3e38, 1e-45], np.float32)
    counts = count(values)
    assert counts.sum() == len(values)
    assert counts[count(np.array([1.0]).astype(np.float32)).argmax()] == 2


def test_the_range_is_that_of_the_largest_number_within_a_64th() -> None:
    for largest in (1e-6, 0.7, 1.0, 1.999, 3e4):
        found = spread(np.linspace(-largest, largest, 99)).largest("max", INT8)
        assert largest <= found <= largest * (1 + 1 / 64) * 1.0001


def test_nothing_but_zeros_has_no_range_and_a_scale_that_divides() -> None:
    for method in METHODS:
        assert spread(np.zeros((4, 4))).largest(method, INT8) == 0
    assert INT8.scale(0.0) == 1


def test_a_percentile_leaves_out_one_number_in_ten_thousand() -> None:
    values = np.full(100_000, 0.5)
    values[:5] = 80
    assert spread(values).largest("percentile", INT8) == pytest.approx(0.5, rel=1 / 64)
    values[:20] = 80
    assert spread(values).largest("percentile", INT8) == pytest.approx(80, rel=1 / 64)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tail", [1, 30, 300])
def test_the_least_error_is_found(form: Format, tail: float) -> None:
    """Against numbers that are really rounded, not counted."""
    values = np.random.default_rng(0).standard_normal(50_000)
    values[:50] *= tail
    found = mean_square_error(values, spread(values).largest("mse", form), form)
    end = np.abs(values).max()
    errors = [mean_square_error(values, end * part, form) for part in np.geomspace(0.01, 1, 60)]
    assert found <= 1.25 * min(errors)


def test_int8_with_a_tail_cuts_it_off_and_fp8_has_no_need_to() -> None:
    values = np.random.default_rng(0).standard_normal(200_000)
    values[0] = end = 30
    assert spread(values).largest("mse", INT8) < 0.6 * end
    assert mean_square_error(values, end, FP8) < 1.5 * mean_square_error(
        values, spread(values).largest("mse", FP8), FP8
    )


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_scales_are_fp16_and_cut_nothing_off(form: Format) -> None:
    largest = np.random.default_rng(0).uniform(1e-3, 30, 1000).astype(np.float32)
    scale = form.scale(largest)
    assert scale.dtype == np.float16
    assert (scale.astype(np.float64) * form.largest >= largest).all()
    assert (scale.astype(np.float64) * form.largest <= largest * 1.01).all()


def test_rounding_is_that_of_onnx() -> None:
    """INT8 to the even one of two neighbours, FP8 to three bits of mantissa, both cut off."""
    values = np.array([0.5, 1.5, -2.5, 126.6, 300, -300], np.float32)
    assert INT8.round(values).tolist() == [0, 2, -2, 127, 127, -127]
    assert FP8.round(np.array([1.05, 1.07, 500, -1e9, 2.0**-9], np.float32)).astype(
        np.float32
    ).tolist() == [1.0, 1.125, 448, -448, 2.0**-9]


@pytest.mark.parametrize("scheme", EVERY_SCHEME)
def test_spreads_are_of_the_tensors_asked_for_and_answers_the_graphs(
    scheme: str, tmp_path: Path
) -> None:
    model = random_model(tiny_config(scheme))
    path = tmp_path / "model.onnx"
    export_onnx(rewrite(model), path)
    clips = random_frames(model.config, batch=3).numpy()
    names = list(dict.fromkeys(linear.activation for linear in linears(path)))
    found = record_spreads(path, names, clips)
    assert list(found.spreads) == names
    graph = onnx.load(path)
    for name in names:
        graph.graph.output.append(onnx.ValueInfoProto(name=name))
    exact = ReferenceEvaluator(graph).run(None, {"frames": clips})
    np.testing.assert_allclose(found.answers.logits, exact[0], atol=1e-5)
    np.testing.assert_allclose(found.answers.embedding, exact[1], atol=1e-5)
    for name, values in zip(names, exact[2:], strict=True):
        spread = found.spreads[name]
        assert spread.rows.shape[1] == values.shape[-1]
        # All rows of a network this small are counted; neighbours of a bin's edge may change side.
        assert spread.counts.sum() == values.size
        assert spread.largest("max", INT8) == pytest.approx(np.abs(values).max(), rel=0.03)
        flat = values.reshape(-1, values.shape[-1])
        nearest = np.abs(flat[None] - spread.rows[:3, None]).max(axis=2).min(axis=1)
        assert nearest.max() < 1e-4, "the rows are rows of the tensor"


def test_clips_beyond_those_that_are_counted_are_answered_only(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    path = tmp_path / "model.onnx"
    export_onnx(rewrite(model), path)
    clips = random_frames(model.config, batch=3).numpy()
    names = [linears(path)[0].activation]
    recorder = SpreadRecorder(names, counted=2)
    some = recorder.calibration(clips, record(path, clips, recorder))
    few = record_spreads(path, names, clips[:2])
    assert (some.counted, few.counted) == (2, 2)
    np.testing.assert_array_equal(some.spreads[names[0]].counts, few.spreads[names[0]].counts)
    np.testing.assert_array_equal(some.spreads[names[0]].rows, few.spreads[names[0]].rows)
    assert len(some.answers.logits) == 3
