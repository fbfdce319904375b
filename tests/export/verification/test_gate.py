"""The gate on the machine at hand: every artefact runs, and what is off is found there too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from export.bundle.bundle import Bundle, BundleError
from export.bundle.manifest import GRAPHS, ONNX_FLOAT32, ONNX_FP16, ONNX_INT8
from export.calibration.clips import held_out_clips, verification_clips
from export.runtime.interface import Outputs, RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import Gpu, Plan, PlanKey, engines_folder
from export.verification.gate import check_bundle
from model.checkpoints import Checkpoint
from tests.export.conftest import plan_facts

H200 = Gpu("NVIDIA H200", "9.0")


@pytest.fixture(scope="module")
def clips(checkpoint: Checkpoint, video: Path) -> NDArray[np.uint8]:
    """Those that the export was verified on."""
    held_out = held_out_clips(checkpoint.config, None)
    return np.concatenate([verification_clips(checkpoint.config, [video]), held_out])


@pytest.fixture
def copy(whole: Bundle, tmp_path: Path) -> Bundle:
    return Bundle(Path(shutil.copytree(whole.path, tmp_path / "tiny" / "1")))


def scale_the_head(graph: Path, factor: float) -> None:
    model = onnx.load(graph)
    (head,) = (node for node in model.graph.node if node.op_type == "Gemm")
    for tensor in model.graph.initializer:
        if tensor.name == head.input[1]:
            values = numpy_helper.to_array(tensor).copy()
            values[0] *= factor
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, graph)


def test_every_artefact_runs_and_measures_what_the_export_did(
    whole: Bundle, clips: NDArray[np.uint8]
) -> None:
    verdict = check_bundle(whole, clips, device="cpu", threads=1)
    assert verdict.passed
    assert verdict.reference.startswith("the network in PyTorch ")
    assert verdict.left_out == ()
    assert [each.artefact for each in verdict.checked] == list(GRAPHS.values())
    for each in verdict.checked:
        published = whole.manifest.verification[each.artefact]
        assert each.parity is not None
        assert each.parity.max_difference == pytest.approx(published.max_difference, abs=1e-4)
        assert (each.engine, each.device) == ("onnxruntime", "cpu")
    assert "emulated" in verdict.checked[1].provider
    assert verdict.checked[1].parity.max_difference > verdict.checked[0].parity.max_difference  # type: ignore[union-attr]


@pytest.mark.parametrize("files", [list(GRAPHS.values())[start::2] for start in (0, 1)], ids=str)
def test_artefacts_that_answer_otherwise_fail_and_no_others(
    copy: Bundle, clips: NDArray[np.uint8], files: list[str]
) -> None:
    for file in files:
        scale_the_head(copy.path / file, -3)
    verdict = check_bundle(copy, clips, device="cpu", threads=1)
    assert not verdict.passed
    assert [each.artefact for each in verdict.checked if not each.passed] == files


def test_a_graph_that_cannot_be_loaded_is_a_failure_with_its_reason(
    copy: Bundle, clips: NDArray[np.uint8]
) -> None:
    (copy.path / ONNX_INT8).write_bytes(b"no graph")
    verdict = check_bundle(copy, clips, device="cpu", threads=1)
    assert not verdict.passed
    (failed,) = (each for each in verdict.checked if not each.passed)
    assert "cannot load" in (failed.problem or "")


def test_a_precision_can_be_asked_for_and_one_that_is_not_there_is_an_error(
    whole: Bundle, exported: Bundle, clips: NDArray[np.uint8]
) -> None:
    verdict = check_bundle(whole, clips, device="cpu", precisions=["int8"], threads=1)
    assert [each.artefact for each in verdict.checked] == [ONNX_INT8]
    with pytest.raises(BundleError, match="nothing of precision int8 in bundle tiny version 1"):
        check_bundle(exported, clips, device="cpu", precisions=["int8"], threads=1)


def test_on_a_gpu_all_but_8_bits_runs_there(
    whole: Bundle, clips: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Recorded(OnnxRuntime):
        def __init__(self, model: Path, *, cuda: bool, **more: Any) -> None:
            opened.append((getattr(model, "name", "emulated"), cuda))
            super().__init__(model, cuda=False, **more)

    monkeypatch.setattr("export.verification.artefacts.OnnxRuntime", Recorded)
    check_bundle(whole, clips, device="cuda", threads=1)
    on_gpu, on_cpu = [(ONNX_FLOAT32, True), (ONNX_FP16, True)], [(ONNX_INT8, False)]
    assert opened[1:] == [*on_gpu, *on_cpu, ("emulated", False), ("emulated", False)]


def test_without_torch_the_float32_graph_stands_for_the_network(whole: Bundle, video: Path) -> None:
    """As on a serving node, where there is no torch and no onnx either."""
    script = (
        "import sys; sys.modules.update({'torch': None, 'onnx': None})\n"
        "from pathlib import Path\n"
        "from export.bundle.bundle import Bundle\n"
        "from export.calibration.clips import verification_clips\n"
        "from export.verification.gate import check_bundle\n"
        "bundle = Bundle(Path(sys.argv[1]))\n"
        "clips = verification_clips(bundle.config, [Path(sys.argv[2])])\n"
        "verdict = check_bundle(bundle, clips, device='cpu', threads=1)\n"
        "print(verdict.reference, *(each.artefact for each in verdict.checked), sep='|')\n"
        "print(*(f'{each.artefact}: {each.reason}' for each in verdict.left_out), sep='|')\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, whole.path, video],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    checked, left_out = answer.stdout.splitlines()
    assert checked == (
        f"{ONNX_FLOAT32} by ONNX Runtime on the CPU, since torch is not installed|{ONNX_INT8}"
    )
    assert f"{ONNX_FLOAT32}: is itself what the others are compared with" in left_out
    assert f"{ONNX_FP16}: on a CPU it takes the package onnx" in left_out


class TestPlans:
    """The GPU is made up; its engine is ONNX Runtime under another name."""

    @pytest.fixture
    def gpu(self, copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        gpu = SimpleNamespace(gpu=H200, factor=1.0, loaded=[])

        class Loaded(OnnxRuntime):
            engine = "tensorrt"

            def run(self, frames: NDArray[np.uint8]) -> Outputs:
                logits, embedding = super().run(frames)
                return Outputs(logits * np.float32(gpu.factor), embedding)

        def load(plan: Plan, largest: int) -> OnnxRuntime:
            gpu.loaded.append(plan.path.name)
            return Loaded(copy.file(ONNX_FLOAT32), cuda=False, threads=1)

        here = SimpleNamespace(cuda=gpu, module=SimpleNamespace(__version__="11.4"), load=load)
        monkeypatch.setattr("export.verification.artefacts.TensorRt", lambda index, engines: here)
        monkeypatch.setattr("export.verification.artefacts._cuda_runs", lambda *arguments: False)
        return gpu

    def write_plan(self, bundle: Bundle, name: str, graph: str, gpu: Gpu = H200) -> str:
        folder = engines_folder(bundle)
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.plan").write_bytes(b"a plan")
        key = PlanKey(
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
            tensorrt="11.4",
            precision="float32",
            batches=(1, 8),
        )
        facts = plan_facts(key, graph)
        (folder / f"{name}.json").write_text(facts.model_dump_json())
        return f"{name}.plan"

    def test_those_that_fit_run_and_the_others_are_named(
        self, copy: Bundle, clips: NDArray[np.uint8], gpu: SimpleNamespace
    ) -> None:
        graph = copy.manifest.files[ONNX_FLOAT32].sha256
        fits = self.write_plan(copy, "fits", graph)
        self.write_plan(copy, "old", "0" * 64)
        self.write_plan(copy, "other", graph, Gpu("NVIDIA L4", "8.9"))
        verdict = check_bundle(copy, clips, threads=1)
        assert verdict.passed
        assert gpu.loaded == [fits]
        assert (verdict.checked[-1].artefact, verdict.checked[-1].engine) == (fits, "tensorrt")
        reasons = {each.artefact: each.reason for each in verdict.left_out}
        assert reasons == {
            "old.plan": "was built from another export",
            "other.plan": "is for NVIDIA L4 with TensorRT 11.4; here is NVIDIA H200 9.0 11.4",
        }

    def test_one_that_answers_otherwise_fails(
        self, copy: Bundle, clips: NDArray[np.uint8], gpu: SimpleNamespace
    ) -> None:
        gpu.factor = 1.01
        name = self.write_plan(copy, "fits", copy.manifest.files[ONNX_FLOAT32].sha256)
        verdict = check_bundle(copy, clips, threads=1)
        assert [each.artefact for each in verdict.checked if not each.passed] == [name]

    def test_without_a_gpu_they_are_left_out_unless_it_was_asked_for(
        self, copy: Bundle, clips: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(index: int, engines: Path | None) -> None:
            raise RuntimeUnavailableError("there is no NVIDIA driver")

        monkeypatch.setattr("export.verification.artefacts.TensorRt", refuse)
        monkeypatch.setattr("export.verification.artefacts._cuda_runs", lambda *arguments: False)
        name = self.write_plan(copy, "fits", copy.manifest.files[ONNX_FLOAT32].sha256)
        for device, reason in (("auto", "there is no NVIDIA driver"), ("cpu", "GPUs only")):
            (left_out,) = check_bundle(copy, clips, device=device, threads=1).left_out  # type: ignore[arg-type]
            assert left_out.artefact == name
            assert reason in left_out.reason
        with pytest.raises(RuntimeUnavailableError, match="no NVIDIA driver"):
            check_bundle(copy, clips, device="cuda", threads=1)
