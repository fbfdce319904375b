"""The parity gate: what passes, and that nothing else does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.runtime import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from export.verify import FLOAT32_LIMIT, compare, run_in_batches

from .conftest import write_colour_graph


def answers(seed: int = 0, scale: float = 1.0) -> Outputs:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((4, 6)).astype(np.float32) * np.float32(scale)
    return Outputs(logits, rng.standard_normal((4, 8)).astype(np.float32))


def changed(values: NDArray[np.float32], by: float, at: tuple[int, int] = (2, 3)) -> NDArray:
    copy = values.copy()
    copy[at] += np.float32(by)
    return copy


def test_equal_answers_pass() -> None:
    parity = compare(answers(), answers())
    assert parity.passed
    assert (parity.clips, parity.max_difference, parity.top1_agreement) == (4, 0, 1)


def test_rounding_passes_and_is_measured() -> None:
    reference = answers()
    parity = compare(reference, reference._replace(logits=changed(reference.logits, 5e-5)))
    assert parity.passed
    assert parity.max_difference == pytest.approx(5e-5, rel=0.01)
    assert parity.mean_difference == pytest.approx(5e-5 / 24, rel=0.01)


def test_one_logit_of_one_clip_that_is_off_fails() -> None:
    reference = answers()
    assert not compare(reference, reference._replace(logits=changed(reference.logits, 0.01))).passed


def test_the_limit_grows_with_the_logits_but_never_falls_below_its_own_size() -> None:
    assert compare(answers(scale=1e-3), answers(scale=1e-3)).limit == FLOAT32_LIMIT
    large = answers(scale=1000)
    parity = compare(large, large._replace(logits=changed(large.logits, 0.01)))
    assert parity.limit == pytest.approx(FLOAT32_LIMIT * float(np.abs(large.logits).max()))
    assert parity.passed


def test_an_embedding_that_is_off_fails_though_the_logits_agree() -> None:
    reference = answers()
    actual = reference._replace(embedding=reference.embedding[:, ::-1])
    parity = compare(reference, actual)
    assert not parity.passed
    assert parity.max_difference == 0
    assert parity.embedding_max_difference > 0.1


def test_permuted_logits_and_swapped_clips_fail() -> None:
    reference = answers()
    permuted = compare(reference, reference._replace(logits=np.roll(reference.logits, 1, axis=1)))
    swapped = compare(reference, Outputs(reference.logits[::-1], reference.embedding[::-1]))
    assert not permuted.passed
    assert permuted.top1_agreement < 1
    assert not swapped.passed


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("side", ["reference", "actual", "both"])
def test_what_is_not_finite_fails_on_either_side(value: float, part: int, side: str) -> None:
    spoilt = list(answers())
    spoilt[part] = changed(spoilt[part], value)
    reference = Outputs(*spoilt) if side != "actual" else answers()
    actual = Outputs(*spoilt) if side != "reference" else answers()
    assert not compare(reference, actual).passed


def test_answers_of_another_shape_are_not_compared() -> None:
    reference = answers()
    with pytest.raises(ValueError, match=r"logits has shape \(1, 6\) instead of \(4, 6\)"):
        compare(reference, Outputs(reference.logits[:1], reference.embedding[:1]))
    with pytest.raises(ValueError, match=r"embedding has shape \(4, 1\)"):
        compare(reference, reference._replace(embedding=reference.embedding[:, :1]))


def test_a_graph_is_run_at_two_batch_sizes(tmp_path: Path) -> None:
    write_colour_graph(tmp_path / "model.onnx")
    runtime = OnnxRuntime(tmp_path / "model.onnx", cuda=False)
    clips = np.random.default_rng(0).integers(0, 256, (4, 4, 16, 16, 3), dtype=np.uint8)
    sizes = []

    class Recorded:
        def run(self, frames: NDArray[np.uint8]) -> Outputs:
            sizes.append(len(frames))
            return runtime.run(frames)

    outputs = run_in_batches(Recorded(), clips)

    assert sizes == [1, 3]
    np.testing.assert_allclose(outputs.logits, clips.mean(axis=(1, 2, 3)) / 64, rtol=1e-5)
    assert outputs.embedding.shape == (4, 16)
