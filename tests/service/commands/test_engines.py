"""`timesformer engines`: plans ahead of serving. The GPU is made up, the builder is real."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from export.bundle import BundleStore
from export.runtime.cuda import Cuda
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import Gpu, layers_file
from export.tensorrt import BuildJob
from service.cli import cli
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
        counted = {"gemm": {"Half": 3}}
        facts_file = Path(facts["path"]).with_suffix(".json")
        told = {**json.loads(facts_file.read_text()), "engine": counted}
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

    def test_a_precision_that_the_bundle_lacks_is_an_error(self, store: BundleStore) -> None:
        answer = timesformer(
            "engines", "build", "--store", store.root, "--precision", "fp16", code=1
        )
        assert "has no graph of precision fp16" in answer.stderr

    @pytest.mark.parametrize("batches", ["8,1", "many", "0", ""])
    def test_batches_are_rising_numbers(self, store: BundleStore, batches: str) -> None:
        answer = timesformer(
            "engines", "build", "--store", store.root, "--batches", batches, code=2
        )
        assert "rising sizes" in answer.stderr


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
