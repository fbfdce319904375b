"""The parity gate: what passes, and that nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.runtime import Outputs
from export.runtime.onnxruntime import OnnxRuntime
from export.verification.parity import FLOAT32, FP16, INT8, Limits, compare, hold, run_in_batches
from tests.export.conftest import write_colour_graph


def answers(seed: int = 0, scale: float = 1.0) -> Outputs:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((4, 6)).astype(np.float32) * np.float32(scale)
    return Outputs(logits, rng.standard_normal((4, 8)).astype(np.float32))


def changed(values: NDArray[np.float32], by: float, at: tuple[int, int] = (2, 3)) -> NDArray:
    copy = values.copy()
    copy[at] += np.float32(by)
    return copy


@pytest.mark.parametrize(
    ("spoil", "label_changes"),
    [
        (lambda logits, embedding: (changed(logits, 0.01), embedding), False),
        (lambda logits, embedding: (logits, embedding[:, ::-1]), False),
        (lambda logits, embedding: (np.roll(logits, 1, axis=1), embedding), True),
        (lambda logits, embedding: (logits[::-1], embedding[::-1]), True),
    ],
    ids=["one logit", "embedding alone", "permuted logits", "swapped clips"],
)
def test_answers_that_are_off_fail(
    spoil: Callable[..., tuple[NDArray, NDArray]], label_changes: bool
) -> None:
    reference = answers()
    parity = compare(reference, Outputs(*spoil(*reference)))
    assert not parity.passed
    assert (parity.top1_agreement < 1) is label_changes


def test_rounding_passes_and_is_measured() -> None:
    reference = answers()
    same = compare(reference, reference)
    assert (same.passed, same.clips, same.max_difference, same.top1_agreement) == (True, 4, 0, 1)
    parity = compare(reference, reference._replace(logits=changed(reference.logits, 5e-5)))
    assert parity.passed
    assert parity.max_difference == pytest.approx(5e-5, rel=0.01)
    assert parity.mean_difference == pytest.approx(5e-5 / 24, rel=0.01)


def test_the_limit_grows_with_the_logits_but_never_falls_below_its_own_size() -> None:
    assert compare(answers(scale=1e-3), answers(scale=1e-3)).limit == FLOAT32.difference
    large = answers(scale=1000)
    parity = compare(large, large._replace(logits=changed(large.logits, 0.01)))
    assert parity.limit == pytest.approx(1e-4 * float(np.abs(large.logits).max()))
    assert parity.passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("side", ["reference", "actual", "both"])
@pytest.mark.parametrize("limits", [FLOAT32, INT8], ids=["float32", "int8"])
def test_what_is_not_finite_fails_on_either_side(
    value: float, part: int, side: str, limits: Limits
) -> None:
    spoilt = list(answers())
    spoilt[part] = changed(spoilt[part], value)
    reference = Outputs(*spoilt) if side != "actual" else answers()
    actual = Outputs(*spoilt) if side != "reference" else answers()
    assert not compare(reference, actual, limits).passed


def rotated(values: NDArray[np.float32], cosine: float) -> NDArray[np.float32]:
    """Rows of the same length and mean whose centred cosine with the given ones is `cosine`."""
    mean = values.mean(axis=1, keepdims=True)
    centred = values - mean
    other = np.random.default_rng(9).standard_normal(values.shape)
    other -= other.mean(axis=1, keepdims=True)
    along = (other * centred).sum(axis=1, keepdims=True) / (centred**2).sum(axis=1, keepdims=True)
    other -= along * centred
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    other *= length / np.linalg.norm(other, axis=1, keepdims=True)
    return (mean + cosine * centred + np.sqrt(1 - cosine**2) * other).astype(np.float32)


class TestByDirection:
    """INT8 is judged by the direction of its answers, not by the size of the difference."""

    @pytest.mark.parametrize("part", [0, 1])
    @pytest.mark.parametrize(("cosine", "passes"), [(0.996, True), (0.994, False)])
    def test_the_cosine_of_logits_and_embedding_decides(
        self, part: int, cosine: float, passes: bool
    ) -> None:
        turned = list(reference := answers())
        turned[part] = rotated(reference[part], cosine)
        parity = compare(reference, Outputs(*turned), INT8)
        cosines = (parity.centred_cosine, parity.embedding_cosine)
        assert cosines[part] == pytest.approx(cosine, abs=1e-6)
        assert cosines[1 - part] == 1
        assert parity.passed is passes
        assert (parity.limit, parity.cosine_limit) == (None, 0.995)

    @pytest.mark.parametrize("limits", [FP16, INT8], ids=["fp16", "int8"])
    @pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 2, 10])
    @pytest.mark.parametrize("part", [0, 1])
    def test_the_right_direction_at_another_scale_fails(
        self, limits: Limits, factor: float, part: int
    ) -> None:
        """Softer or sharper scores are other answers, though no label changes."""
        scaled = list(reference := answers(scale=3))
        scaled[part] = scaled[part] * np.float32(factor)
        parity = compare(reference, Outputs(*scaled), limits)
        assert min(parity.centred_cosine, parity.embedding_cosine) == pytest.approx(1)  # type: ignore[type-var]
        assert parity.top1_agreement == 1
        errors = (parity.relative_error, parity.embedding_relative_error)
        assert errors[part] is not None
        assert errors[part] >= abs(factor - 1) - 1e-6
        assert errors[1 - part] == 0
        assert not parity.passed

    def test_an_embedding_that_is_shifted_as_a_whole_fails(self) -> None:
        reference = answers()
        actual = reference._replace(embedding=reference.embedding + 1)
        parity = compare(reference, actual, INT8)
        assert parity.embedding_cosine == pytest.approx(1)
        assert not parity.passed

    def test_scores_that_diverge_fail_though_the_error_is_within_its_limit(self) -> None:
        """Where logits are large, a twentieth of their spread may be the whole of the scores."""
        logits = np.full((4, 6), -20, np.float32)
        logits[:, :2] = 20, 20.001
        reference = answers()._replace(logits=logits)
        parity = compare(reference, reference._replace(logits=changed(logits, 3, (2, 0))), INT8)
        assert parity.centred_cosine is not None
        assert parity.centred_cosine > 0.995
        assert parity.relative_error is not None
        assert parity.relative_error < 0.15
        assert parity.softmax_divergence == pytest.approx(0.855, abs=0.01)
        assert not parity.passed

    def test_it_is_the_worst_clip_that_counts(self) -> None:
        reference = answers()
        logits = reference.logits.copy()
        logits[2] = rotated(reference.logits, 0.9)[2]
        parity = compare(reference, reference._replace(logits=logits), INT8)
        assert parity.centred_cosine == pytest.approx(0.9, abs=1e-6)
        assert not parity.passed

    def test_what_all_logits_have_in_common_does_not_count(self) -> None:
        """A large mean would hide any error in a plain cosine, and a softmax never sees it."""
        reference = answers()
        shifted = compare(reference, reference._replace(logits=reference.logits + 3), INT8)
        assert shifted.centred_cosine == pytest.approx(1)
        hidden = Outputs(reference.logits + 1000, reference.embedding)
        permuted = hidden._replace(logits=np.roll(hidden.logits, 1, axis=1))
        assert not compare(hidden, permuted, INT8).passed

    def test_answers_without_a_direction_pass_only_if_they_are_the_same(self) -> None:
        flat = Outputs(np.ones((2, 6), np.float32), np.ones((2, 8), np.float32))
        assert compare(flat, flat, INT8).passed
        assert not compare(flat, flat._replace(logits=changed(flat.logits, 1, (1, 1))), INT8).passed


class TestLabels:
    def clear_and_close(self) -> Outputs:
        """40 clips of 50 classes; the best is ahead by 5 but for the first clip, where it is by
        0.01."""
        logits = np.random.default_rng(0).uniform(-1, 1, (40, 50)).astype(np.float32)
        logits[:, 7] = 6
        logits[0, 8] = 5.99
        return Outputs(logits, np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32))

    def test_one_that_changes_where_the_margin_is_clear_fails(self) -> None:
        reference = self.clear_and_close()
        logits = reference.logits.copy()
        logits[5, 0] = 7
        loose = INT8._replace(cosine=0.5, divergence=None)
        parity = compare(reference, reference._replace(logits=logits), loose)
        assert parity.top1_agreement == 39 / 40
        assert not parity.passed

    def test_noise_on_one_clip_is_no_excuse_for_another(self) -> None:
        """A label that changes on a quiet clip is not explained by what happens on a loud one."""
        reference = self.clear_and_close()
        reference.logits[5] *= 100
        reference.logits[9, 8] = 4.9
        logits = reference.logits.copy()
        logits[5, 8:] += 5
        loose = Limits(difference=None, cosine=None, error=0.3)
        assert compare(reference, reference._replace(logits=logits), loose).passed
        logits[9, 8] = 6.05
        parity = compare(reference, reference._replace(logits=logits), loose)
        assert parity.relative_error is not None
        assert parity.relative_error < 0.3
        assert not parity.passed

    def test_one_that_changes_where_two_are_as_good_passes_and_is_told(self) -> None:
        reference = self.clear_and_close()
        logits = reference.logits.copy()
        logits[:, 8] += 0.05
        parity = compare(reference, reference._replace(logits=logits), INT8)
        assert parity.passed
        assert parity.top1_agreement == 39 / 40
        assert (parity.low_margin_clips, parity.low_margin_agreement) == (1, 0)

    def test_without_a_clip_in_doubt_there_is_no_agreement_on_them(self) -> None:
        parity = compare(self.clear_and_close(), self.clear_and_close())
        assert (parity.low_margin_clips, parity.low_margin_agreement) == (0, None)

    def test_top_five_agreement_is_of_the_sets(self) -> None:
        logits = np.array([[9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3]], np.float32)
        actual = np.array([[5, 6, 7, 8, 9, 4, 3], [9, 8, 7, 6, 3, 4, 5]], np.float32)
        embedding = np.ones((2, 8), np.float32)
        parity = compare(Outputs(logits, embedding), Outputs(actual, embedding))
        assert parity.top5_agreement == 0.9

    def test_two_classes_have_no_top_five_and_one_class_no_margin(self) -> None:
        for classes in (1, 2):
            few = Outputs(answers().logits[:, :classes], answers().embedding)
            parity = compare(few, few)
            assert parity.passed
            assert parity.top5_agreement == 1


def test_divergence_of_the_scores_is_the_worst_clips() -> None:
    logits = np.log(np.array([[0.5, 0.5], [0.5, 0.5]])).astype(np.float32)
    actual = np.log(np.array([[0.5, 0.5], [0.75, 0.25]])).astype(np.float32)
    embedding = np.ones((2, 8), np.float32)
    parity = compare(Outputs(logits + 100, embedding), Outputs(actual, embedding))
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert parity.softmax_divergence == pytest.approx(expected, rel=1e-4)


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


class Plan:
    """An engine with profiles and slots, as a plan of TensorRT: all that it runs is noted. It has
    no more of a `Runtime` than `hold` asks for.
    """

    slots = 2
    batches = (1, 8, 16)

    def __init__(self, wrong: tuple[int, int] | None = None) -> None:
        self.wrong = wrong
        """Batch size and slot of a kernel that is off."""
        self.runs: list[tuple[int, int]] = []

    def run(self, frames: NDArray[np.uint8]) -> Outputs:
        at = (len(frames), len(self.runs) % self.slots)
        self.runs.append(at)
        flat = frames.reshape(len(frames), -1).astype(np.float32) / 255
        off = np.float32(0.01 if at == self.wrong else 0)
        return Outputs(flat[:, :6] + off, flat[:, 6:14])


class TestEachWayOfBatching:
    clips = np.random.default_rng(0).integers(0, 256, (5, 16), np.uint8)

    def reference(self) -> Outputs:
        return Plan().run(self.clips)

    def test_the_least_and_largest_batch_of_each_profile_runs_in_every_slot(self) -> None:
        plan = Plan()
        assert hold(plan, self.clips, self.reference(), FLOAT32).passed  # type: ignore[arg-type] # see Plan
        assert {(size, slot) for size in (1, 2, 8, 9, 16) for slot in (0, 1)} <= set(plan.runs)

    @pytest.mark.parametrize("slot", [0, 1])
    @pytest.mark.parametrize("size", [1, 2, 8, 9, 16])
    def test_a_kernel_that_is_wrong_in_one_of_them_alone_fails(self, size: int, slot: int) -> None:
        wrong = Plan((size, slot))
        assert not hold(wrong, self.clips, self.reference(), FLOAT32).passed  # type: ignore[arg-type] # see Plan

    def test_an_engine_without_sizes_of_its_own_sees_each_clip_once(self) -> None:
        engine = Plan()
        engine.batches = ()
        parity = hold(engine, self.clips, self.reference(), FLOAT32)  # type: ignore[arg-type] # see Plan
        assert parity.clips == 5
        assert [size for size, _ in engine.runs] == [1, 4]
