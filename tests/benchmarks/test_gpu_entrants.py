"""What the script for GPU machines measures: its networks, products and engines, on a CPU."""

from __future__ import annotations

import argparse
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.rewrite import rewrite
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import Plan
from export.verify import LIMITS
from model.config import ATTENTION_TYPES
from tests.benchmarks import gpu_bench, gpu_engines, gpu_networks, gpu_products
from tests.benchmarks.gpu import Script
from tests.benchmarks.gpu_bench import Agreement, Bench, Entrant, agreement
from tests.benchmarks.gpu_products import Factor, Product, products_of
from tests.benchmarks.half import halve
from tests.export.conftest import write_colour_graph
from tests.export.runtime.fake_cuda import FakeCuda
from tests.export.runtime.test_tensorrt import clips, plan, runtime_on
from tests.model.conftest import random_frames, random_model, tiny_config

__all__ = ["plan"]  # a fixture


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    options = argparse.Namespace(
        device="cpu", variant="demo", dtype="bf16", backend="eager", rounds=2, turn_seconds=0.0,
        work=tmp_path_factory.mktemp("work"),
    )  # fmt: skip
    return Bench(options)


class _Batched(TorchDispatchMode):
    """Counts how often many small matrices are multiplied with one and the same. The last block's
    one row a clip is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        small = func is torch.ops.aten.bmm.default and args[1].stride(0) == 0
        if small and args[0].shape[1] > 1:
            self.found[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


class TestProducts:
    @pytest.mark.parametrize("scheme", ATTENTION_TYPES)
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
    def test_no_weights_are_multiplied_group_by_group(
        self, scheme: str, dtype: torch.dtype | None
    ) -> None:
        """A group has as many tokens as a clip has frames: too few to fill anything."""
        config = tiny_config(scheme)
        network = rewrite(random_model(config))
        if dtype is not None:
            halve(network, dtype)
        with torch.no_grad(), _Batched() as batched:  # composed, in inference mode, stays so
            network(random_frames(config, batch=2))
        assert batched.found == {}

    @pytest.mark.parametrize("scheme", ATTENTION_TYPES)
    def test_they_are_all_of_the_networks_work(self, scheme: str) -> None:
        config = tiny_config(scheme)
        network = rewrite(random_model(config))
        counted = gpu_bench.multiply_adds(network)
        halve(network, torch.float16)
        found = products_of(network, 3)
        assert sum(count * multiply_adds(each) for each, count in found.items()) == 3 * counted

    def test_of_16_bits_are_those_that_are_many(self, bench: Bench) -> None:
        network = bench.rewritten(torch.float16)
        found = products_of(network, 2)
        half = {each for each in found if each.factors[0].dtype == torch.float16}
        assert {each.kind for each in half} == {"linear", "attention"}
        work = sum(count * multiply_adds(each) for each, count in found.items())
        assert sum(found[each] * multiply_adds(each) for each in half) > 0.95 * work

    def test_a_factor_lies_in_memory_as_the_one_that_it_stands_for(self) -> None:
        whole = torch.zeros(2, 5, 3, 4, dtype=torch.bfloat16)
        for seen in (whole, whole.permute(2, 0, 3, 1)[1:], whole[:1].expand(7, -1, -1, -1)):
            factor = Factor(tuple(seen.shape), seen.stride(), seen.dtype)
            made = factor.make(torch.device("cpu"))
            assert (made.shape, made.stride(), made.dtype) == (
                seen.shape,
                seen.stride(),
                seen.dtype,
            )


def multiply_adds(product: Product) -> int:
    one, other = (factor.shape for factor in product.factors[:2])
    if product.kind == "linear":
        return one[0] * one[1] * other[0]
    if product.kind == "attention":
        return 2 * int(np.prod(one)) * other[-2]
    groups = np.broadcast_shapes(one[:-2], other[:-2])
    return int(np.prod(groups)) * one[-2] * one[-1] * other[-1]


class TestAnswers:
    @pytest.mark.parametrize("precision", ["fp16", "bf16", "float32"])
    def test_only_the_same_answers_pass(self, bench: Bench, precision: str) -> None:
        exact = logits, embedding = bench.exact(bench.frames(3))
        assert agreement(exact, exact, precision).passed
        of_other_clips = tuple(part.roll(1, 0) for part in exact)
        of_another_scale = tuple(part * 1.3 for part in exact)
        assert not agreement(exact, of_other_clips, precision).passed
        assert not agreement(exact, of_another_scale, precision).passed
        for value in (float("nan"), float("inf")):
            broken = embedding.clone()
            broken[1, 0] = value
            found = agreement(exact, (logits, broken), precision)
            assert found == Agreement(None, None, None, False)
        with pytest.raises(ValueError, match="instead of"):
            agreement(exact, bench.exact(bench.frames(1)), precision)

    def test_the_limits_are_those_of_the_gate(self) -> None:
        for precision, limits in (("fp16", LIMITS["fp16"]), ("float32", LIMITS["float32"])):
            assert gpu_bench.COSINES.get(precision) == limits.cosine
            assert gpu_bench.ERRORS.get(precision) == limits.error
        assert limits.difference == gpu_bench.DIFFERENCE

    def test_an_entrant_that_answers_wrongly_is_told(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = gpu_networks.eager

        def eager(bench: Bench, frames: Tensor) -> dict[str, Entrant]:
            right = real(bench, frames)[gpu_networks.REWRITTEN]
            wrong = right._replace(answers=lambda: upside_down(right))
            silent = right._replace(answers=None)
            return {"right": right, "wrong": wrong, "silent": silent}

        def upside_down(entrant: Entrant) -> Any:
            return tuple(-part for part in entrant.answers())

        monkeypatch.setattr(gpu_networks, "eager", eager)
        bench.left_out = {}
        rows = Script(bench).inference("eager", 2)
        assert {row["entrant"]: row["passed"] for row in rows} == {"right": True, "wrong": False}
        assert bench.left_out["silent"] == "ValueError: it answers nothing"


class TestGraphs:
    def test_captured_work_warms_up_on_a_stream_and_is_recorded_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cuda, order = MagicMock(), []
        for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
        for part in ("stream", "graph"):
            block = getattr(cuda, part).return_value
            block.__enter__.side_effect = lambda *_, part=part: order.append(part)
        replay, _ = gpu_networks.captured(lambda: order.append("work"))
        assert order == ["stream", *["work"] * 3, "graph", "work"]
        cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value)
        assert replay is cuda.CUDAGraph.return_value.replay

    @pytest.fixture
    def replays(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """A CPU that passes for a GPU, whose graphs do their work again as long as this says so."""
        working = [True]

        def captured(work: Any) -> Any:
            made = work()

            def replay() -> None:
                for old, new in zip(made or (), work() or (), strict=True):
                    if working[0]:
                        old.copy_(new)

            return replay, made

        monkeypatch.setattr(Bench, "cuda", True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(gpu_networks, "captured", captured)
        monkeypatch.setattr(gpu_products, "captured", captured)
        monkeypatch.setattr(gpu_products, "large_side", lambda bench: 64)
        return working

    @pytest.mark.parametrize(
        ("section", "graphs"),
        [
            ("eager", {gpu_networks.REWRITTEN_GRAPH}),
            (
                "compile",
                {gpu_networks.FUSED_COMPILED_GRAPH, gpu_networks.REWRITTEN_COMPILED_GRAPH},
            ),
        ],
    )
    def test_they_are_entrants_and_their_answers_are_checked(
        self, bench: Bench, replays: list[bool], section: str, graphs: set[str]
    ) -> None:
        bench.left_out = {}
        rows = Script(bench).inference(section, 2)
        assert {row["entrant"] for row in rows} > graphs
        assert all(row["passed"] and row["share_of_own_products"] for row in rows)
        assert bench.left_out == {}

    def test_one_that_writes_nothing_is_wrong(self, bench: Bench, replays: list[bool]) -> None:
        replays[0] = False
        rows = Script(bench).inference("eager", 2)
        wrong = [row["entrant"] for row in rows if not row["passed"]]
        assert wrong == [gpu_networks.REWRITTEN_GRAPH]


class TestEngines:
    """With the CPU and a made-up GPU in the place of a real one."""

    def check(self, entrant: Entrant, frames: np.ndarray) -> None:
        for _ in range(5):
            entrant.run()
        entrant.finish()
        assert entrant.answers is not None
        logits, embedding = entrant.answers()
        expected = frames.mean(axis=(1, 2, 3)) / 64
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5)
        np.testing.assert_allclose(embedding.numpy()[:, 0], expected.sum(axis=1), rtol=1e-5)

    def test_onnx_runtime_on_frames_that_are_there_and_as_it_is_served(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        write_colour_graph(tmp_path / "model.onnx")
        runtime, frames = OnnxRuntime(tmp_path / "model.onnx", cuda=False, threads=1), clips(3)
        self.check(gpu_engines.bound(runtime, torch.from_numpy(frames), bench), frames)
        self.check(gpu_engines.served(runtime, frames), frames)

    def test_tensorrt_launches_alone(self, plan: Plan) -> None:
        cuda, frames = FakeCuda(), clips(3)
        runtime = runtime_on(cuda, plan)
        entrant = gpu_engines.launched(runtime, frames)
        cuda.fail = "to_device"  # the frames stay where they are
        before = cuda.launches
        self.check(entrant, frames)
        assert cuda.launches - before == 6
        runtime.close()
        assert cuda.leaks() == []

    def test_tensorrt_as_it_is_served_has_two_batches_on_their_way(self, plan: Plan) -> None:
        cuda, frames = FakeCuda(), clips(3)
        runtime = runtime_on(cuda, plan)
        entrant = gpu_engines.served(runtime, frames)
        both = threading.Barrier(2)
        cuda.before_synchronize = lambda: both.wait(300) and None
        for _ in range(4):
            entrant.run()
        entrant.finish()
        assert cuda.most_streams_at_once == 2
        cuda.before_synchronize = lambda: None
        self.check(entrant, frames)
        runtime.close()
        assert cuda.leaks() == []

    def test_the_graph_is_the_networks(self, bench: Bench) -> None:
        graph = gpu_engines.write_graph(bench.model, bench.work)
        frames = bench.frames(2)
        runtime = OnnxRuntime(graph, cuda=False, threads=1)
        logits, embedding = runtime.run(frames.numpy())
        given = torch.from_numpy(logits), torch.from_numpy(embedding)
        assert agreement(bench.exact(frames), given, "fp16").passed

    def test_a_plan_is_built_for_the_batches_that_are_measured_and_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graph, loaded = tmp_path / "model.fp16.onnx", []
        graph.write_bytes(b"a graph")
        here = SimpleNamespace(
            cuda=FakeCuda(),
            module=SimpleNamespace(__version__="11.4"),
            load=lambda job, largest: loaded.append((job, largest)),
        )
        monkeypatch.setattr(gpu_engines, "TensorRt", lambda: here)
        monkeypatch.setattr(gpu_engines, "build_plan", lambda job: job)
        for largest in (64, 32):
            gpu_engines.load_plan(graph, largest)
        assert [(job.key.batches, largest) for job, largest in loaded] == [
            ((1, 8, 32, 64), 64),
            ((1, 8, 32), 32),
        ]
        assert {(job.key.precision, job.graph) for job, _ in loaded} == {("fp16", graph)}

    def test_one_that_is_not_there_is_left_out_with_its_reason_at_every_batch(
        self, bench: Bench, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_gpu(*_: Any, **__: Any) -> None:
            raise RuntimeUnavailableError("this ONNX Runtime has no GPU")

        cuda = FakeCuda()
        monkeypatch.setattr(gpu_engines, "write_graph", lambda model, folder: folder)
        monkeypatch.setattr(gpu_engines, "OnnxRuntime", no_gpu)
        monkeypatch.setattr(gpu_engines, "load_plan", lambda graph, largest: runtime_on(cuda, plan))
        bench.left_out = {}
        engines = gpu_engines.Engines(bench, 6)
        for batch in (2, 4):
            bench.left_out = {}
            frames = clips(batch)
            entrants = engines.entrants(torch.from_numpy(frames))
            assert list(entrants) == [gpu_networks.TENSORRT, gpu_networks.TENSORRT_SERVED]
            assert list(bench.left_out) == [gpu_networks.ONNX_RUNTIME]
            for entrant in entrants.values():
                self.check(entrant, frames)
        engines.close()
        assert cuda.leaks() == []
