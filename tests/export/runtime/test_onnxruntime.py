"""ONNX Runtime: a device that was asked for, or an error; never another one in silence."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export.bundle.bundle import Bundle, BundleError, BundleStore
from export.bundle.manifest import LABELS, ONNX_FLOAT32, ONNX_INT8, WEIGHTS, Choice
from export.runtime import (
    Device,
    Precision,
    Runtime,
    RuntimeUnavailableError,
    device_name,
    load_runtime,
    load_runtimes,
)
from export.runtime.onnxruntime import OnnxRuntime, _load_cuda_libraries
from tests.export.conftest import (
    COLOURS,
    PASSED,
    colour_manifest,
    publish_colours,
    write_colour_graph,
)

CUDA = "CUDAExecutionProvider"
without_gpu = pytest.mark.skipif(
    CUDA in onnxruntime.get_available_providers(), reason="a GPU may be here"
)


@pytest.fixture
def bundle(store: BundleStore) -> Bundle:
    return publish_colours(store)


def clips(count: int = 2) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 4, 16, 16, 3), dtype=np.uint8)


def test_runs_a_bundle_on_the_cpu_and_says_so(bundle: Bundle) -> None:
    runtime = load_runtime(bundle, "cpu", threads=1)
    frames = clips()
    outputs = runtime.run(frames)

    assert (runtime.engine, runtime.provider, runtime.device) == (
        "onnxruntime",
        "CPUExecutionProvider",
        "cpu",
    )
    assert outputs.logits.dtype == outputs.embedding.dtype == np.float32
    np.testing.assert_allclose(outputs.logits, frames.mean(axis=(1, 2, 3)) / 64, rtol=1e-5)
    runtime.close()


def test_several_threads_may_run_it_at_once(bundle: Bundle) -> None:
    runtime = load_runtime(bundle, "cpu", threads=1)
    batches = [clips(count) for count in range(1, 9)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda frames: runtime.run(frames).logits, batches))
    for frames, logits in zip(batches, answers, strict=True):
        np.testing.assert_allclose(logits, frames.mean(axis=(1, 2, 3)) / 64, rtol=1e-5)


def test_a_session_does_not_let_its_threads_spin(bundle: Bundle) -> None:
    session = OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False)._session
    options = session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(RuntimeUnavailableError, match="no CUDAExecutionProvider"):
        load_runtime(bundle, "cuda")


@without_gpu
def test_left_the_choice_it_takes_the_cpu_and_warns(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    load_runtime(bundle, "cpu", threads=1)
    assert not caplog.records, "the CPU was asked for"
    assert load_runtime(bundle, "auto", threads=1).device == "cpu"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no GPU is used: this ONNX Runtime has no CUDAExecutionProvider" in record.message


MakeCuda = Callable[..., list[object]]


@pytest.fixture
def make_cuda(monkeypatch: pytest.MonkeyPatch) -> MakeCuda:
    """Makes sessions on the CPU that claim other providers; returns the providers asked for."""

    def make(*said: str, strays: bool = True) -> list[object]:
        real, asked = onnxruntime.InferenceSession, []

        class OnCuda(real):  # type: ignore[valid-type,misc]
            def get_providers(self) -> list[str]:
                return list(said)

            def get_provider_graph_assignment_info(self) -> list[object]:
                return super().get_provider_graph_assignment_info() if strays else []

        def session(path: object, options: object, providers: list[object]) -> OnCuda:
            asked.extend(providers)
            return OnCuda(path, options, ["CPUExecutionProvider"])

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA])
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        return asked

    return make


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        # As when ONNX Runtime's CUDA libraries are there and the driver is not.
        (["CPUExecutionProvider"], "fell back to CPUExecutionProvider"),
        # ONNX Runtime leaves an operator that its CUDA provider lacks to the CPU, and says nothing.
        ([CUDA, "CPUExecutionProvider"], "would compute MatMul on the CPU"),
    ],
)
def test_work_on_the_cpu_in_silence_is_an_error_where_the_gpu_was_asked_for(
    bundle: Bundle, make_cuda: MakeCuda, said: list[str], reason: str
) -> None:
    make_cuda(*said)
    with pytest.raises(RuntimeUnavailableError, match=reason):
        load_runtime(bundle, "cuda")


@pytest.mark.parametrize("gpu", [0, 3])
def test_the_session_is_made_on_the_gpu_that_was_asked_for(
    bundle: Bundle, make_cuda: MakeCuda, gpu: int
) -> None:
    asked: list[Any] = make_cuda(CUDA, strays=False)
    (runtime,) = load_runtimes(bundle, "cuda", gpus=(gpu,))
    ((provider, options),) = asked
    assert (provider, options["device_id"]) == (CUDA, str(gpu))
    assert options["use_tf32"] == "0", "float32 is float32"
    assert (runtime.gpu, device_name(runtime)) == (gpu, f"cuda:{gpu}")


def test_the_libraries_that_were_installed_with_it_are_loaded_before_a_session_on_a_gpu(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[str] = []

    def preload() -> None:
        calls.append("libraries")
        print("Failed to load libcudnn.so.9")

    def session(*arguments: object, **options: object) -> None:
        calls.append("session")
        raise ValueError("no driver")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    load_runtime(bundle, "cpu", threads=1).close()
    assert calls == []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    _load_cuda_libraries.cache_clear()
    with pytest.raises(RuntimeUnavailableError, match="no driver"):
        load_runtime(bundle, "cuda")
    _load_cuda_libraries.cache_clear()
    assert calls == ["libraries", "session"]
    assert capsys.readouterr().out == "", "stdout is for answers"
    assert "ONNX Runtime: Failed to load libcudnn.so.9" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_a_file_that_is_no_model_is_an_error_that_names_it(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RuntimeUnavailableError, match=r"cannot load .*model\.onnx"):
        OnnxRuntime(path, cuda=False)


class TestPrecision:
    """The bundle's INT8 graph here answers a hundred times as much, so that it is told apart."""

    @pytest.fixture
    def both(self, store: BundleStore) -> Bundle:
        with store.staging("both") as staging:
            write_colour_graph(staging / ONNX_FLOAT32)
            write_colour_graph(staging / ONNX_INT8, 0.64)
            (staging / LABELS).write_text("\n".join(COLOURS) + "\n")
            (staging / WEIGHTS).write_bytes(b"none")
            verification = {ONNX_FLOAT32: PASSED, ONNX_INT8: PASSED}
            manifest = colour_manifest("both").model_copy(update={"verification": verification})
            return store.publish(staging, manifest)

    def factor(self, runtime: Runtime) -> float:
        frames = clips(1)
        return float((runtime.run(frames).logits / (frames.mean(axis=(1, 2, 3)) / 64)).mean())

    def test_float32_serves_unless_int8_is_asked_for(self, both: Bundle) -> None:
        assert self.factor(load_runtime(both, "cpu")) == pytest.approx(1)
        assert self.factor(load_runtime(both, "cpu", precision="float32")) == pytest.approx(1)
        assert self.factor(load_runtime(both, "cpu", precision="int8")) == pytest.approx(100)

    def test_auto_takes_int8_where_there_is_one_and_says_what_it_took(
        self, both: Bundle, bundle: Bundle
    ) -> None:
        for given, factor, precision in ((both, 100, "int8"), (bundle, 1, "float32")):
            runtime = load_runtime(given, "cpu", precision="auto")
            assert self.factor(runtime) == pytest.approx(factor)
            assert runtime.precision == precision

    @without_gpu
    def test_int8_needs_no_gpu_and_does_not_look_for_one(
        self, both: Bundle, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert load_runtime(both, "auto", precision="int8").device == "cpu"
        assert not caplog.records

    def test_auto_takes_what_the_export_measured_to_be_faster(self, both: Bundle) -> None:
        for order in (("float32", "int8"), ("int8", "float32")):
            choice = Choice(order=order, reason="measured", milliseconds=None)
            both.manifest = both.manifest.model_copy(update={"fastest": {"cpu": choice}})
            assert load_runtime(both, "cpu", precision="auto").precision == order[0]

    @pytest.mark.parametrize(
        ("device", "precision"),
        [("cuda", "int8"), ("cuda", "fp16"), ("auto", "fp8"), ("cpu", "fp16")],
    )
    def test_what_is_tensorrts_alone_is_an_error(
        self, both: Bundle, device: Device, precision: Precision
    ) -> None:
        with pytest.raises(RuntimeUnavailableError, match=f"{precision} cannot be served"):
            load_runtime(both, device, precision=precision)


@pytest.mark.parametrize(("precision", "file"), [("float32", ONNX_FLOAT32), ("int8", ONNX_INT8)])
def test_a_bundle_without_the_graph_is_an_error_that_names_the_file(
    bundle: Bundle, precision: Precision, file: str
) -> None:
    bundle.manifest = bundle.manifest.model_copy(update={"files": {}})
    with pytest.raises(BundleError, match=f"has no {file}"):
        load_runtime(bundle, "cpu", precision=precision)


def test_it_reports_nothing_to_its_makers() -> None:
    # Where it reports, it keeps an id in the home, and complains if it cannot.
    inherited = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", "import export.runtime.onnxruntime"],
        env=inherited | {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
