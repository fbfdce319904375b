"""What is measured, and that the figures mean what they say; never how fast anything is."""

from __future__ import annotations

import functools
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from export import startup, yardsticks
from export.artefacts import Artefact, Found
from export.bench import Entrant, Turn, share_of_limit, speed_up, take_turns, timing
from export.bundle import Bundle, BundleError
from export.limit import products_alone
from export.machine import machine_facts, resident_bytes, versions
from export.manifest import ONNX_FLOAT32, ONNX_INT8
from export.measure import measure_bundle
from export.onnx import ExportError, export_onnx
from export.precision import quantize
from export.published import AsPublished
from export.rewrite import rewrite
from export.runtime.onnxruntime import OnnxRuntime
from export.startup import Startup, StartupError
from export.yardsticks import COMPILED, EAGER, HUGGING_FACE, NAIVE, OPENVINO
from model.config import ATTENTION_TYPES, AttentionType
from model.cost import cost
from tests.model.conftest import random_model, tiny_config

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

    def test_a_turn_goes_on_until_its_time_is_up(self) -> None:
        slow = Entrant("slow", lambda frames: time.sleep(0.02), None)
        turns = take_turns([slow], CLIPS, (1,), 1, turn_seconds=0.05)
        (turn,) = turns["slow", 1]
        assert 1 < len(turn.seconds) <= 3
        assert sum(turn.seconds) >= 0.05


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

    def test_the_share_of_the_limit_is_of_multiply_adds_a_second(self) -> None:
        network, limit = [Turn((2.0,), 2.0)], [Turn((1.0,), 1.0)]
        assert share_of_limit(network, limit, 100, 100).median == 0.5
        assert share_of_limit(network, limit, 100, 200).median == 0.25


class TestLimit:
    @pytest.mark.parametrize("scheme", ["divided_space_time", "sparse_local_global"])
    def test_it_has_the_products_of_the_graph_and_takes_every_batch(
        self, scheme: AttentionType, tmp_path: Path
    ) -> None:
        network = rewrite(random_model(tiny_config(attention_type=scheme)))
        export_onnx(network, tmp_path / "model.onnx")
        quantize(tmp_path / "model.onnx", tmp_path / "model.int8.onnx")
        for file, operators in (
            ("model.onnx", {"MatMul"}),
            ("model.int8.onnx", {"MatMul", "MatMulInteger"}),
        ):
            limit = products_alone(tmp_path / file)
            count = sum(n.op_type in operators for n in onnx.load(tmp_path / file).graph.node)
            runtime = OnnxRuntime(limit.graph, cuda=False, threads=1)
            for batch in (1, 3):
                read, _ = runtime.run(np.ones(batch, np.uint8))
                assert read.shape == (count,)
                assert np.isfinite(read).all()
                assert len(np.unique(read)) > count / 2, "products that are alike are done once"

    def test_its_multiply_adds_are_those_of_the_network_but_for_the_head(
        self, tmp_path: Path
    ) -> None:
        from export.rewrite import multiply_adds

        network = rewrite(random_model(tiny_config()))
        export_onnx(network, tmp_path / "model.onnx")
        head = network.head.in_features * network.head.out_features
        found = products_alone(tmp_path / "model.onnx").multiply_adds
        assert found == multiply_adds(network) - head

    def test_a_graph_without_products_has_none(self, tmp_path: Path) -> None:
        frames = onnx.helper.make_tensor_value_info("frames", onnx.TensorProto.UINT8, ["n", 2])
        output = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 2])
        node = onnx.helper.make_node("Cast", ["frames"], ["logits"], to=onnx.TensorProto.FLOAT)
        graph = onnx.helper.make_graph([node], "no products", [frames], [output])
        onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
        with pytest.raises(ExportError, match="has no matrix product"):
            products_alone(tmp_path / "model.onnx")


class TestYardsticks:
    @pytest.mark.parametrize("scheme", ATTENTION_TYPES)
    def test_the_network_as_published_gives_the_same_answers(self, scheme: AttentionType) -> None:
        model = random_model(tiny_config(attention_type=scheme))
        frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
        with torch.inference_mode():
            for one, other in zip(model(frames), AsPublished.of(model)(frames), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    def test_its_plain_export_keeps_the_whole_last_block(self, tmp_path: Path) -> None:
        """Ours alone lets the exporter drop the MLP of patches that nobody reads."""
        model = random_model(tiny_config())
        for name, network in (("ours", model), ("published", AsPublished.of(model))):
            export_onnx(network, tmp_path / f"{name}.onnx")
        graphs = [onnx.load(tmp_path / f"{name}.onnx").graph for name in ("ours", "published")]
        ours, published = (sum(n.op_type == "Gelu" for n in graph.node) for graph in graphs)
        assert published == ours + 1 == 2 * model.config.depth, "of patches and of the class token"


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


class Process:
    """Puts a run in this process in the place of a process of its own, on an artefact whose engine
    is made up; keeps what `find_artefacts` was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.asked: dict[str, Any] = {}
        self._capsys = capsys
        monkeypatch.setattr(startup.subprocess, "run", self._run)
        monkeypatch.setattr(startup, "find_artefacts", self._find)
        self._argv = functools.partial(monkeypatch.setattr, sys, "argv")

    def _find(self, bundle: Bundle, **asked: Any) -> Found:
        self.asked = asked
        engine: Any = SimpleNamespace(run=lambda frames: None)
        plan = Artefact("some.plan", "fp16", "cuda", bundle.path / ONNX_FLOAT32, lambda: engine)
        return Found((plan,), (), True)

    def _run(self, command: list[str], **options: Any) -> Any:
        self._argv(command[2:])
        startup.main()
        return SimpleNamespace(returncode=0, stdout=self._capsys.readouterr().out, stderr="")


def test_a_plan_is_started_for_batches_as_large_as_those_measured(
    exported: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each size that it is made ready for takes time and memory."""
    process = Process(monkeypatch, capsys)
    plan = Artefact("some.plan", "fp16", "cuda", exported.path / ONNX_FLOAT32, pytest.fail)
    found = startup.measure(exported.path, plan, largest=16, engines=[tmp_path])
    assert (process.asked["largest"], process.asked["engines"]) == (16, [tmp_path])
    assert found.start_seconds > found.load_seconds >= 0

    def refuse(*arguments: object, largest: int, **options: object) -> Startup:
        process.asked = {"largest": largest}
        raise StartupError("not now")

    monkeypatch.setattr("export.measure.measure_startup", refuse)
    measured = measure_bundle(exported, tmp_path, batches=(1, 3), rounds=1, device="cpu", threads=1)
    assert process.asked == {"largest": 3}
    assert [each.reason for each in measured.left_out] == ["not now"]


class TestBundle:
    def test_everything_is_measured_beside_each_other_with_how_far_it_is_off(
        self, int8: Bundle, tmp_path: Path
    ) -> None:
        found = measure_bundle(
            int8, tmp_path, precisions=["all"], batches=(1, 2), rounds=1, device="cpu", threads=1
        )
        names = [f"{file}, CPUExecutionProvider" for file in (ONNX_FLOAT32, ONNX_INT8)]
        assert [(row.engine, row.batch) for row in found.rows] == [
            (name, batch) for batch in (1, 2) for name in names
        ]
        exact, rounded = found.rows[:2]
        assert exact.off_by == 0 < rounded.off_by < 0.1
        assert exact.speed_up.median == 1
        for row in found.rows:
            assert row.of_limit is not None
            assert row.of_limit.median > 0
            assert row.timing.multiply_adds_per_second
        assert found.startups.keys() == {ONNX_FLOAT32, ONNX_INT8}
        for each in found.startups.values():
            assert 0 < each.load_seconds < each.start_seconds
            assert each.resident_bytes > 0
            assert each.device_bytes is None
        assert found.to_dict()["engines"][0]["timing"]["calls"] >= 1

    def test_a_precision_that_is_not_there_is_an_error(
        self, exported: Bundle, tmp_path: Path
    ) -> None:
        with pytest.raises(BundleError, match=r"nothing of .* in that precision can run here"):
            measure_bundle(exported, tmp_path, precisions=["int8"], device="cpu")

    def test_others_run_the_same_weights_or_are_named_with_the_reason(
        self, exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_compiler(*arguments: object, **options: object) -> None:
            raise RuntimeError("no compiler here\nand more")

        monkeypatch.setattr(torch, "compile", no_compiler)
        threads = torch.get_num_threads()
        found = measure_bundle(exported, tmp_path, rounds=1, against=True, device="cpu", threads=1)
        torch.set_num_threads(threads)
        rows = {row.engine: row for row in found.rows}
        reasons = {each.artefact: each.reason for each in found.left_out}
        assert found.yardstick == NAIVE
        assert reasons[COMPILED] == "RuntimeError: no compiler here"
        for name in (NAIVE, EAGER, HUGGING_FACE, OPENVINO):
            assert (name in rows) is not (name in reasons)
        for row in rows.values():
            assert row.off_by < 1e-5
        assert rows[EAGER].timing.multiply_adds_per_second == pytest.approx(
            cost(exported.config).multiply_adds * rows[EAGER].timing.clips_per_second
        )

    @pytest.mark.parametrize("package", ["transformers", "openvino"])
    def test_a_program_that_is_not_installed_is_named(
        self, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        network = AsPublished.of(random_model(tiny_config()))
        openers = {
            "transformers": lambda: yardsticks._hugging_face(network, tmp_path, cuda=False),
            "openvino": lambda: yardsticks._openvino(tmp_path / "model.onnx", 1),
        }
        with pytest.raises(ImportError) as missing:
            openers[package]()
        assert yardsticks._why(missing.value) == f"{package} is not installed"


class TestMachine:
    def test_it_says_what_figures_depend_on(self) -> None:
        facts = machine_facts()
        assert facts["cores"] >= 1
        assert facts["cpu"]
        assert versions(["numpy", "no-such-package"]) == {"numpy": np.__version__}

    def test_memory_is_read_from_the_kernel(self, tmp_path: Path) -> None:
        (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  200 kB\nVmRSS:\t  100 kB\n")
        assert resident_bytes(tmp_path / "status") == (102_400, 204_800)
        before, _ = resident_bytes()
        held: NDArray[np.float64] = np.ones(4_000_000)
        after, _ = resident_bytes()
        assert after - before > held.nbytes / 2
