"""The engine builder. TensorRT-RTX builds for real here, without a GPU; nothing is run on one."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph.onnx_export import export_onnx
from export.graph.rewrite import rewrite
from export.runtime.plans import (
    PlanError,
    PlanFacts,
    PlanKey,
    find_plan,
    layers_file,
    plans_in,
    profiles,
    read_plan,
)
from export.runtime.tensorrt import log_of
from export.tensorrt import builder as tensorrt
from export.tensorrt.builder import BuildJob, build_plan, find_built, layer_types, parse, structure
from tests.export.conftest import EVERY_SCHEME, write_colour_graph
from tests.model.conftest import random_model, tiny_config

RTX = "tensorrt_rtx_bindings"
trt = pytest.importorskip(RTX, reason="TensorRT-RTX is not installed, of the extra `dev`")


def key(**changes: Any) -> PlanKey:
    fields = {
        "gpu": "NVIDIA H200",
        "compute_capability": "9.0",
        "tensorrt": "11.4.0.106",
        "precision": "float32",
        "batches": (1, 4),
    }
    return PlanKey(**{**fields, **changes})


def job(graph: Path, folder: Path, **changes: Any) -> BuildJob:
    sha256 = hashlib.sha256(graph.read_bytes()).hexdigest()
    fields = {"graph": graph, "graph_sha256": sha256, "folder": folder, "key": key()}
    return BuildJob(**{**fields, "module": RTX, **changes})


class Loading:
    """TensorRT-RTX's builder with a runtime that is made up: it loads every plan, as on a GPU, and
    gives `engine`."""

    def __init__(self, engine: object, **more: Any) -> None:
        self.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
        self.__dict__.update(more)

    def __getattr__(self, name: str) -> Any:
        return getattr(trt, name)


def built_here(module: Loading, wanted: BuildJob) -> PlanFacts:
    """Builds as the child does, of which only the runtime is made up; what is told of the plan."""
    told = wanted.model_copy(update={"module": "tensorrt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # RTX's, of measurements
        tensorrt._build(cast(ModuleType, module), told, lambda share, step: None)
    found = find_built(told.model_copy(update={"rebuild": False}))
    assert found is not None
    read_plan(found)
    return found.facts


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """The smallest graph with our input and outputs."""
    path = tmp_path / "model.onnx"
    write_colour_graph(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "engines"


class TestBuild:
    @pytest.mark.parametrize("scheme", EVERY_SCHEME)
    def test_a_network_of_each_scheme_becomes_a_plan(
        self, scheme: str, tmp_path: Path, folder: Path
    ) -> None:
        graph = tmp_path / "model.onnx"
        export_onnx(rewrite(random_model(tiny_config(scheme))), graph)
        shares: list[float] = []
        plan = build_plan(job(graph, folder), lambda share, step: shares.append(share))

        assert plan.path.stat().st_size == plan.facts.plan.size > graph.stat().st_size
        assert hashlib.sha256(read_plan(plan)).hexdigest() == plan.facts.plan.sha256
        assert plan.facts.warnings == ()
        for kind in ("MATRIX_MULTIPLY", "NORMALIZATION", "SOFTMAX"):
            assert set(plan.facts.network[kind]) == {"FLOAT"}, "the graph is float32"
        blocks = tiny_config(scheme).depth
        assert plan.facts.network["SOFTMAX"]["FLOAT"] >= blocks
        assert shares == sorted(shares)
        assert 0.5 < shares[-1] <= 1

    def test_another_graph_is_another_plan(self, colours: Path, folder: Path) -> None:
        first = build_plan(job(colours, folder))
        write_colour_graph(colours, 0.5)
        second = build_plan(job(colours, folder))
        assert second.facts.graph_sha256 != first.facts.graph_sha256
        assert second.facts.structure == first.facts.structure, "only its weights are others"
        assert [plan.facts for plan in plans_in(folder)] == [second.facts]

    def test_a_plan_that_was_built_less_hard_or_cannot_be_refitted_is_built_again(
        self, colours: Path, folder: Path
    ) -> None:
        first = build_plan(job(colours, folder, level=1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("subprocess.Popen", None)
            assert build_plan(job(colours, folder, level=1)) == first
            assert build_plan(job(colours, folder, level=0)) == first, "it is better than asked for"
        harder = build_plan(job(colours, folder, level=2))
        assert (harder.facts.level, harder.facts.created > first.facts.created) == (2, True)
        assert [plan.facts for plan in plans_in(folder)] == [harder.facts]
        assert find_built(job(colours, folder, level=2, refittable=True)) is None
        facts = harder.facts.model_copy(update={"refittable": True})
        harder.path.with_suffix(".json").write_text(facts.model_dump_json())
        found = find_built(job(colours, folder, level=2, refittable=True))
        assert found is not None, "TensorRT-RTX builds refittable plans on GPUs alone"

    def test_what_is_there_is_built_again_where_that_is_asked_for(
        self, colours: Path, folder: Path
    ) -> None:
        first = build_plan(job(colours, folder))
        layers_file(first.path).write_text("{}")
        again = build_plan(job(colours, folder, rebuild=True))
        assert again.facts.created > first.facts.created
        assert not layers_file(first.path).is_file(), "it was of the other plan"
        assert build_plan(job(colours, folder)) == again

    def test_a_build_that_fails_leaves_the_plan_that_was_there(
        self, colours: Path, folder: Path
    ) -> None:
        first = build_plan(job(colours, folder))
        layers_file(first.path).write_text("{}")
        with pytest.raises(PlanError, match="TensorRT cannot be imported"):
            build_plan(job(colours, folder, rebuild=True, module="no_such_tensorrt"))
        broken = job(colours, folder, rebuild=True)
        colours.write_bytes(b"no graph")
        with pytest.raises(PlanError, match="cannot parse"):
            build_plan(broken)
        assert [plan.facts for plan in plans_in(folder)] == [first.facts]
        read_plan(first)
        assert layers_file(first.path).is_file()

    def test_two_builders_of_one_plan_build_it_once(self, colours: Path, folder: Path) -> None:
        with ThreadPoolExecutor(2) as threads:
            plans = list(threads.map(build_plan, [job(colours, folder)] * 2))
        assert plans[0] == plans[1]

    @pytest.mark.parametrize("batches", [(), (0, 4), (8, 1), (4, 4)])
    def test_batches_that_make_no_profiles_are_refused(self, batches: tuple[int, ...]) -> None:
        with pytest.raises(PlanError, match="positive and rising"):
            profiles(batches)
        assert profiles((1, 8, 32)) == [(1, 1, 1), (2, 8, 8), (9, 32, 32)], "no batch is left out"

    def test_a_profile_that_the_graph_cannot_take_is_an_error_that_says_why(
        self, colours: Path, folder: Path
    ) -> None:
        model = onnx.load(colours)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        onnx.save(model, colours)
        with pytest.raises(PlanError, match=r"dim|shape|profile|batch") as caught:
            build_plan(job(colours, folder))
        assert "no reason" not in str(caught.value)
        assert list(plans_in(folder)) == []


class TestRefusals:
    def test_nodes_that_the_parser_does_not_take_are_named(
        self, colours: Path, folder: Path
    ) -> None:
        model = onnx.load(colours)
        node = helper.make_node("DynamicQuantizeLinear", ["means"], ["q", "s", "z"], name="round")
        model.graph.node.append(node)
        model.graph.output.append(helper.make_tensor_value_info("q", TensorProto.UINT8, None))
        onnx.save(model, colours)
        with pytest.raises(PlanError, match=r"cannot parse model\.onnx: round \(DynamicQuant"):
            build_plan(job(colours, folder))

    def test_a_graph_that_is_not_ours_is_refused(self, colours: Path, folder: Path) -> None:
        model = onnx.load(colours)
        del model.graph.output[1:]
        onnx.save(model, colours)
        with pytest.raises(PlanError, match="no graph of ours"):
            build_plan(job(colours, folder))

    @pytest.mark.parametrize("decomposed", [False, True])
    def test_a_layer_norm_in_fp16_is_refused(
        self, colours: Path, folder: Path, decomposed: bool
    ) -> None:
        """As one operator TensorRT takes it in silence; decomposed, it warns while it builds."""
        write_half_norm(colours, decomposed)
        with pytest.raises(PlanError, match="LayerNorm in FP16"):
            build_plan(job(colours, folder))
        assert list(plans_in(folder)) == []


def write_half_norm(path: Path, decomposed: bool) -> None:
    """The colour graph with a LayerNorm over its logits, in FP16."""
    write_colour_graph(path)
    model = onnx.load(path)
    half = TensorProto.FLOAT16
    nodes = [helper.make_node("Cast", ["means"], ["x"], to=half)]
    if decomposed:
        nodes += [
            helper.make_node("ReduceMean", ["x", "last"], ["m"]),
            helper.make_node("Sub", ["x", "m"], ["d"]),
            helper.make_node("Pow", ["d", "two"], ["sq"]),
            helper.make_node("ReduceMean", ["sq", "last"], ["v"]),
            helper.make_node("Add", ["v", "eps"], ["ve"]),
            helper.make_node("Sqrt", ["ve"], ["sd"]),
            helper.make_node("Div", ["d", "sd"], ["n"]),
            helper.make_node("Mul", ["n", "scale"], ["ns"]),
            helper.make_node("Add", ["ns", "bias"], ["normal"]),
        ]
    else:
        nodes += [helper.make_node("LayerNormalization", ["x", "scale", "bias"], ["normal"])]
    nodes += [helper.make_node("Cast", ["normal"], ["logits"], to=TensorProto.FLOAT)]
    kept = [node for node in model.graph.node if node.output[0] != "logits"]
    constants = {
        "last": np.array([-1], np.int64),
        "two": np.float16(2),
        "eps": np.float16(1e-3),
        "scale": np.ones(3, np.float16),
        "bias": np.ones(3, np.float16),
    }
    del model.graph.node[:]
    model.graph.node.extend([*kept[:2], *nodes, *kept[2:]])
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    onnx.save(model, path)


class TestChild:
    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
        """Writes a module that a child can import as TensorRT; returns its name."""
        paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        monkeypatch.setenv("PYTHONPATH", paths)

        def write(source: str) -> str:
            (tmp_path / "crashing.py").write_text(f"import os, pathlib, signal, sys\n{source}")
            return "crashing"

        return write

    def test_a_crash_of_the_builder_is_an_error_message(
        self, colours: Path, folder: Path, module: Callable[[str], str]
    ) -> None:
        crashing = module(
            "print('myelin gave up', file=sys.stderr, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGSEGV)\n"
        )
        with pytest.raises(PlanError, match=r"ended by SIGSEGV.*myelin gave up"):
            build_plan(job(colours, folder, module=crashing))

    def test_a_crash_while_refitting_is_no_reason_not_to_build(
        self, colours: Path, folder: Path, module: Callable[[str], str]
    ) -> None:
        crashing_once = module(
            "first = pathlib.Path(__file__).with_name('crashed')\n"
            "if not first.exists():\n"
            "    first.touch()\n"
            "    os.kill(os.getpid(), signal.SIGSEGV)\n"
            f"from {RTX} import *\n"
        )
        source = folder.with_name("of another version.json")
        wanted = job(colours, folder, module=crashing_once, refit_from=(source,))
        assert build_plan(wanted).path.is_file()

    def test_a_killed_build_leaves_no_plan_and_the_next_one_builds(
        self, colours: Path, folder: Path
    ) -> None:
        with pytest.raises(PlanError, match="ended by SIGKILL"):
            build_plan(job(colours, folder), on_start=lambda child: child.kill())
        assert find_plan(folder, key(), job(colours, folder).graph_sha256) is None
        assert build_plan(job(colours, folder)).path.is_file()

    def test_a_full_disk_is_an_error_and_leaves_nothing(
        self,
        colours: Path,
        folder: Path,
        full_disk: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        with full_disk(20_000), pytest.raises(PlanError, match=r"cannot write .*\.plan"):
            build_plan(job(colours, folder))
        assert [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] == []


class TestPlansOnDisk:
    def test_half_a_plan_is_not_seen(self, colours: Path, folder: Path) -> None:
        plan = build_plan(job(colours, folder))
        facts = plan.path.with_suffix(".json")
        content = plan.path.read_bytes()
        plan.path.write_bytes(content[:-1])
        assert list(plans_in(folder)) == []
        plan.path.write_bytes(content)
        assert len(list(plans_in(folder))) == 1
        facts.write_text(facts.read_text()[:-10])
        assert list(plans_in(folder)) == []

    def test_a_plan_fits_the_same_gpu_version_precision_and_graph(
        self, colours: Path, folder: Path
    ) -> None:
        plan = build_plan(job(colours, folder))
        sha256 = plan.facts.graph_sha256
        assert find_plan(folder, key(), sha256) == plan
        assert find_plan(folder, key(batches=(1, 2)), sha256) == plan, "it reaches that far"
        for other in (
            {"gpu": "NVIDIA L4"},
            {"compute_capability": "8.9"},
            {"tensorrt": "11.5"},
            {"precision": "fp16"},
            {"batches": (1, 8)},
        ):
            assert find_plan(folder, key(**other), sha256) is None
        assert find_plan(folder, key(), "0" * 64) is None


def network_of(graph: Path) -> tuple[Any, ...]:
    """The network, and what must live as long as it does."""
    log = log_of(trt)
    log.forget()
    builder = trt.Builder(log)
    return parse(trt, builder, graph, log), builder, log


class TestCompiling:
    """What TensorRT is told and what is made of its answer; only the answer is made up."""

    def compiled(self, graph: Path, answer: Callable[[Any, Any], Any], **options: Any) -> bytes:
        network, builder, log = network_of(graph)
        answering = SimpleNamespace(
            create_builder_config=builder.create_builder_config,
            create_optimization_profile=builder.create_optimization_profile,
            build_serialized_network=lambda network, config: answer(config, log),
        )
        wanted = job(graph, graph.parent / "engines", **options)
        return tensorrt.compile_network(
            trt, answering, network, wanted, log, lambda share, step: None
        )

    def test_it_is_told_what_was_asked_for(self, colours: Path) -> None:
        def answer(config: Any, log: Any) -> memoryview:
            assert config.builder_optimization_level == 1
            assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
            assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
            assert config.progress_monitor is not None
            assert not config.get_flag(trt.BuilderFlag.TF32), "float32 is float32"
            assert config.num_optimization_profiles == 2
            return memoryview(b"a plan")

        assert self.compiled(colours, answer, level=1, workspace_bytes=1 << 28) == b"a plan"

    def test_no_answer_is_explained_by_the_log(self, colours: Path) -> None:
        def answer(config: Any, log: Any) -> None:
            log.log(trt.ILogger.ERROR, "myelin gave up")

        with pytest.raises(PlanError, match=r"could not build model\.onnx: myelin gave up"):
            self.compiled(colours, answer)

    @pytest.mark.parametrize(("content", "size"), [(b"half", 8), (b"", 0)])
    def test_a_plan_that_is_shorter_than_it_says_is_refused(
        self, colours: Path, content: bytes, size: int
    ) -> None:
        class Answer:
            nbytes = size

            def __bytes__(self) -> bytes:
                return content

        with pytest.raises(PlanError, match=f"gave {len(content)} of the {size} bytes"):
            self.compiled(colours, lambda config, log: Answer())


def test_networks_are_counted_and_told_apart_by_structure(colours: Path, tmp_path: Path) -> None:
    network, *_alive = network_of(colours)
    again, *_alive_as_well = network_of(colours)
    assert structure(trt, again) == structure(trt, network)
    assert layer_types(network)["REDUCE"] == {"FLOAT": 1}
    assert "CONSTANT" not in layer_types(network)
    write_half = tmp_path / "other.onnx"
    write_colour_graph(write_half)
    model = onnx.load(write_half)
    model.graph.node[2].op_type = "Mul"
    onnx.save(model, write_half)
    other, *_alive_too = network_of(write_half)
    assert structure(trt, other) != structure(trt, network)


def test_the_progress_rises_through_nested_phases_and_a_lost_listener_stops_the_build() -> None:
    told: list[tuple[float, str]] = []
    log = SimpleNamespace(half_norms=False)
    monitor = tensorrt._monitor(trt, lambda share, step: told.append((share, step)), log)
    monitor.phase_start("build", None, 2)
    monitor.phase_start("inner", "build", 4)
    assert monitor.step_complete("inner", 1)
    assert told[-1] == (0.25, "inner")
    monitor.phase_finish("inner")
    assert monitor.step_complete("build", 0)
    assert told[-1] == (0.5, "build")
    log.half_norms = True
    assert not monitor.step_complete("build", 1), "a plan that will be refused is not finished"

    def gone(share: float, step: str) -> None:
        raise BrokenPipeError

    log.half_norms = False
    monitor = tensorrt._monitor(trt, gone, log)
    monitor.phase_start("build", None, 2)
    assert not monitor.step_complete("build", 0)
