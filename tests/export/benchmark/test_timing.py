"""What is measured, and that the figures mean what they say; never how fast anything is."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from export.benchmark.suite import measure_bundle
from export.benchmark.timing import Entrant, Turn, speed_up, take_turns, timing
from export.bundle.bundle import Bundle, BundleError
from export.bundle.manifest import ONNX_FLOAT32, ONNX_INT8
from export.graph.int8_cpu import quantize
from tests.export.conftest import VirtualClock

CLIPS = np.zeros((2, 4, 16, 16, 3), np.uint8)


class TestTurns:
    def test_entrants_take_turns_in_every_round_and_the_first_round_is_not_kept(self) -> None:
        calls: list[tuple[str, int]] = []

        def entrant(name: str) -> Entrant:
            return Entrant(name, lambda frames: calls.append((name, len(frames))), None)

        turns = take_turns([entrant("a"), entrant("b")], CLIPS, (1, 4), 3, turn_seconds=0)

        assert calls == [("a", 1), ("b", 1), ("a", 4), ("b", 4)] * 4
        assert {key: len(found) for key, found in turns.items()} == {
            ("a", 1): 3, ("b", 1): 3, ("a", 4): 3, ("b", 4): 3
        }  # fmt: skip

    def test_take_turns_repeats_a_call_until_the_turn_is_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = VirtualClock(monkeypatch)
        slow = Entrant("slow", lambda frames: clock.advance(0.02), None)
        turns = take_turns([slow], CLIPS, (1,), 1, turn_seconds=0.05)
        (turn,) = turns["slow", 1]
        assert turn.seconds == pytest.approx((0.02, 0.02, 0.02))
        assert turn.cpu == pytest.approx(0.02)


class TestFigures:
    def test_percentiles_and_rates_are_of_all_calls(self) -> None:
        turns = [Turn((0.1, 0.1, 0.1), 0.1), Turn((0.1, 0.6), 0.3)]
        found = timing(turns, batch=4, multiply_adds=1000)
        assert (found.calls, found.p50_ms) == (5, pytest.approx(100))
        assert found.p50_ms < found.p90_ms < found.p99_ms < 600
        assert found.clips_per_second == pytest.approx(4 * 5 / 1.0)
        assert found.multiply_adds_per_second == pytest.approx(20_000)
        assert timing(turns, 4, None).multiply_adds_per_second is None

    def test_a_ratio_is_taken_within_a_round_so_that_a_busy_one_does_not_count(self) -> None:
        """The machine is ten times slower in the second round, for both."""
        slow = [Turn((2.0,), 2.0), Turn((20.0,), 4.0), Turn((2.0,), 2.0)]
        fast = [Turn((1.0,), 0.5), Turn((10.0,), 1.0), Turn((1.0,), 0.5)]
        assert speed_up(fast, slow) == (2, 2, 2)
        assert speed_up(fast, slow, cpu=True) == (4, 4, 4)
        assert speed_up(slow, fast).median == 0.5


@pytest.fixture(scope="module")
def int8(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("int8") / "tiny" / "1"
    shutil.copytree(exported.path, folder)
    quantize(folder / ONNX_FLOAT32, folder / ONNX_INT8)
    bundle = Bundle(folder)
    files = {**bundle.manifest.files, ONNX_INT8: bundle.manifest.files[ONNX_FLOAT32]}
    manifest = bundle.manifest.model_copy(update={"files": files})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return Bundle(folder)


class TestBundle:
    @pytest.mark.slow
    def test_everything_is_measured_beside_each_other_with_how_far_it_is_off(
        self, int8: Bundle
    ) -> None:
        found = measure_bundle(
            int8, precisions=["all"], batches=(1, 2), rounds=1, device="cpu", threads=1
        )
        names = [f"{file}, CPUExecutionProvider" for file in (ONNX_FLOAT32, ONNX_INT8)]
        assert [(row.engine, row.batch) for row in found.rows] == [
            (name, batch) for batch in (1, 2) for name in names
        ]
        exact, rounded = found.rows[:2]
        assert exact.off_by == 0 < rounded.off_by < 0.1
        assert exact.speed_up.median == 1
        assert all(row.timing.multiply_adds_per_second for row in found.rows)

    def test_a_precision_that_is_not_there_is_an_error(self, exported: Bundle) -> None:
        with pytest.raises(BundleError, match=r"nothing of .* in that precision can run here"):
            measure_bundle(exported, precisions=["int8"], device="cpu")
