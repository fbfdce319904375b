"""`timesformer engines`: plans ahead of serving. The GPU is made up, the builder is real."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from export.bundle.bundle import Bundle, BundleStore
from export.bundle.manifest import ONNX_FLOAT32
from export.runtime.cuda import Cuda
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import Gpu, Plan, PlanError, layers_file
from export.runtime.tensorrt import TensorRt, Wanted
from export.tensorrt.builder import BuildJob
from service.cli.main import cli
from service.settings import load_settings
from tests.export.conftest import publish_colours

RTX = "tensorrt_rtx_bindings"


def timesformer(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Two versions, the first of them active."""
    store = BundleStore(tmp_path / "a store")
    publish_colours(store), publish_colours(store)
    store.activate("colours", "1")
    return store


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed, of the extra `dev`")
    monkeypatch.setattr(
        "export.runtime.tensorrt.Cuda",
        lambda index: SimpleNamespace(gpu=Gpu("NVIDIA H200", "9.0")),
    )
    monkeypatch.setattr(
        "export.runtime.tensorrt.load_tensorrt", lambda: SimpleNamespace(__version__="1.7")
    )
    monkeypatch.setattr(BuildJob, "of", functools.partial(BuildJob.of, module=RTX))


def stop(job: BuildJob, progress: object) -> None:
    raise PlanError("stopped")


@pytest.mark.usefixtures("gpu")
class TestBuild:
    def test_it_builds_the_active_version_once_and_says_where(self, store: BundleStore) -> None:
        first = timesformer("engines", "build", "--store", store.root, "--batches", "1,2")
        plan = store.root / "colours/1/engines/nvidia-h200_sm90_trt1.7_float32_b1-2.plan"
        assert plan.is_file()
        assert "colours version 1: built in" in first.stdout
        assert str(plan) in first.stdout
        assert "colours version 1: 0%, " in first.stderr, "progress, without a terminal too"
        again = timesformer("engines", "build", "--store", store.root, "--batches", "1,2")
        assert "already there" in again.stdout
        assert not (store.root / "colours/2/engines").exists()
        store.open("colours").verify()  # plans are beside what was published

    def test_a_bundles_folder_and_a_folder_for_plans_can_be_given(
        self, store: BundleStore, tmp_path: Path
    ) -> None:
        answer = timesformer(
            *("engines", "build", store.root / "colours" / "2", "--batches", "2"),
            *("--engines", tmp_path / "plans", "--workspace", 64, "--level", 1, "--json"),
        )
        facts = json.loads(answer.stdout)
        assert facts["built"]
        assert facts["level"] == 1
        assert Path(facts["path"]).parent == tmp_path / "plans" / "colours" / "2"
        rows = json.loads(
            timesformer(
                "engines", "list", "--store", store.root, "--engines", tmp_path / "plans", "--json"
            ).stdout
        )
        assert [(row["version"], row["batches"], row["of_this_graph"]) for row in rows] == [
            ("2", [2], True)
        ]
        assert rows[0]["network"]["MATRIX_MULTIPLY"] == {"FLOAT": 1}
        assert (rows[0]["engine"], rows[0]["layers"]) == (None, None), "no GPU has loaded it"
        unread = timesformer("engines", "list", "--store", store.root, "--engines",
                             tmp_path / "plans")  # fmt: skip
        assert unread.stdout.count("not told") == 2
        counted = {"gemm": {"Half": 3}, "kgen": {"Float": 2}}
        facts_file = Path(facts["path"]).with_suffix(".json")
        told = {
            **json.loads(facts_file.read_text()),
            "engine": counted,
            "products": {"FP16": 2, "FP8": 1},
            "warnings": ["something is odd"],
        }
        facts_file.write_text(json.dumps(told))
        layers_file(Path(facts["path"])).write_text("{}")
        (row,) = json.loads(
            timesformer("engines", "list", "--engines", tmp_path / "plans",
                        store.root / "colours" / "2", "--json").stdout
        )  # fmt: skip
        assert row["engine"] == counted
        assert row["layers"] == str(layers_file(Path(facts["path"])))
        table = timesformer(
            "engines", "list", "--store", store.root, "--engines", tmp_path / "plans"
        )
        assert "NVIDIA H200" in table.stdout
        assert "FP16 3, FP32 2" in table.stdout, "layers"
        assert "FP8 1, FP16 2" in table.stdout, "matrix products"
        assert f"{facts['path']}: something is odd" in table.stderr

    def test_by_default_it_builds_what_the_service_would(
        self, store: BundleStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        real = TensorRt.wanted

        def wanted(here: TensorRt, bundle: Bundle, precision: str, *rest: Any) -> Wanted:
            asked.append(precision)
            return real(here, bundle, precision, *rest)

        monkeypatch.setattr(TensorRt, "wanted", wanted)
        command = ("engines", "build", "--store", store.root, "--batches", "2")
        for setting in (None, "auto"):
            if setting is not None:
                monkeypatch.setenv("TIMESFORMER_PRECISION", setting)
            timesformer(*command)
            assert asked[-1] == load_settings().precision == (setting or "float32")
        timesformer(*command, "--precision", "float32")
        assert asked[-1] == "float32"

    def test_measurements_are_kept_in_a_folder(self, store: BundleStore, tmp_path: Path) -> None:
        """What TensorRT-RTX measures is nothing: here only where it would be."""
        jobs: list[BuildJob] = []
        command = ("engines", "build", "--store", store.root, "--batches", "2")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("export.tensorrt.builder.find_built", jobs.append)
            patch.setattr("export.tensorrt.builder.build_plan", stop)
            timesformer(*command, code=1)
            timesformer(*command, "--timing-cache", tmp_path / "timings", code=1)
        beside, elsewhere = [job.timings for job in jobs]
        assert beside == store.root / "colours/1/engines/nvidia-h200_sm90_trt1.7.timings"
        assert elsewhere == tmp_path / "timings" / "nvidia-h200_sm90_trt1.7.timings"
        (tmp_path / "a file").touch()
        answer = timesformer(*command, "--timing-cache", tmp_path / "a file", code=2)
        assert "is a file" in answer.stderr

    def test_choose_builds_proves_and_measures_and_says_what_auto_is(
        self, store: BundleStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(self: TensorRt, plan: Plan, largest: int) -> OnnxRuntime:
            assert plan.path.is_file()
            return OnnxRuntime(plan.path.parents[1] / ONNX_FLOAT32, cuda=False)

        monkeypatch.setattr(TensorRt, "load", load)
        command = ("engines", "choose", "--store", store.root, "--batches", "1,2", "--batch", 2)
        answer = timesformer(*command)
        assert "colours version 1 on NVIDIA H200" in answer.stdout
        assert "ms a clip, 2 at a time" in answer.stdout
        assert answer.stdout.splitlines()[-1] == "auto is float32 here"
        assert "proving float32" in answer.stderr
        facts = json.loads(timesformer(*command, "--json").stdout)
        assert list(facts["milliseconds"]) == ["float32"]
        refused = timesformer(*command[:-1], 3, code=2)
        assert "let the last of --batches be as large" in refused.stderr
        (note,) = (store.root / "colours/1/engines").glob("*.fastest")
        assert note.name == "nvidia-h200_sm90_trt1.7.fastest"

    def test_batches_are_rising_numbers(self, store: BundleStore) -> None:
        for batches in ("8,1", "many", ""):
            command = ("engines", "build", "--store", store.root, "--batches", batches)
            assert "rising sizes" in timesformer(*command, code=2).stderr


def test_without_plans_the_list_says_how_to_make_one(store: BundleStore) -> None:
    assert "no plans" in timesformer("engines", "list", "--store", store.root).stdout


def test_without_a_gpu_building_says_what_is_missing(store: BundleStore) -> None:
    try:
        Cuda()
    except RuntimeUnavailableError as error:
        missing = str(error)
    else:
        pytest.skip("a GPU is here")
    answer = timesformer("engines", "build", "--store", store.root, code=1)
    assert missing in answer.stderr
