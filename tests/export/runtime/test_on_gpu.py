"""What only a GPU can show: `make test-gpu`, on a machine with one, TensorRT and cuda-bindings.

Skipped elsewhere. The network is tiny, and its weights are such that each of them matters; what is
expected of an engine is what the gate of the export expects.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle.bundle import Bundle, BundleStore
from export.bundle.manifest import GRAPHS, ONNX_FLOAT32, ONNX_FP16, Parity
from export.calibration.clips import verification_clips
from export.pipeline import export_bundle
from export.runtime.interface import Outputs, Runtime, RuntimeUnavailableError
from export.runtime.onnxruntime import OnnxRuntime
from export.runtime.plans import GPU_GRAPHS, Plan, PlanError
from export.runtime.tensorrt import TensorRt
from export.tensorrt.builder import BuildJob, build_plan
from export.tensorrt.precision_benchmark import measure_fastest
from export.verification.engine_check import Proof
from export.verification.gate import check_bundle
from export.verification.parity import LIMITS, compare
from model.checkpoints import load_checkpoint, save_safetensors
from model.config import ModelConfig
from tests.model.conftest import random_model, tiny_config

Frames = NDArray[np.uint8]

BATCHES = (1, 4, 6)
LARGEST = BATCHES[-1]
PRECISIONS = tuple(GPU_GRAPHS)
# What a driver keeps for itself after a load may be more after the first, and then no more.
SLACK = 32 << 20
pytestmark = pytest.mark.timeout(900)


def sized() -> ModelConfig:
    """Sizes that products of 8 bits want: multiples of 16."""
    return tiny_config(embed_dim=64, num_heads=2)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> TensorRt:
    try:
        return TensorRt(engines=tmp_path_factory.mktemp("engines"))
    except RuntimeUnavailableError as error:
        pytest.skip(f"no GPU: {error}")


@pytest.fixture(scope="module")
def versions(
    here: TensorRt, video: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    """Two versions of a bundle, with other weights each; the first has all precisions."""
    folder = tmp_path_factory.mktemp("bundles")
    store, bundles = BundleStore(folder / "store"), []
    for seed, precisions in enumerate((["fp16", "int8", "fp8"], ["fp16"])):
        path = folder / f"{seed}.safetensors"
        save_safetensors(random_model(sized(), seed), path, sized())
        checkpoint = load_checkpoint(path)
        bundles.append(
            export_bundle(checkpoint, "tiny", store, videos=[video], precisions=precisions)
        )
    return bundles[0], bundles[1]


@pytest.fixture(scope="module")
def bundle(versions: tuple[Bundle, Bundle]) -> Bundle:
    return versions[0]


@pytest.fixture(scope="module")
def clips(video: Path) -> Frames:
    """More than the largest batch, no two alike."""
    seen = verification_clips(sized(), [video])
    darker = [(seen // share).astype(np.uint8) for share in (2, 3)]
    return np.concatenate([seen, *darker])


Plans = Callable[[str], Plan]


@pytest.fixture(scope="module")
def plan(here: TensorRt, bundle: Bundle) -> Plans:
    """Builds a plan of a precision, once for all tests."""

    def built(precision: str) -> Plan:
        try:
            wanted = here.wanted(bundle, precision, BATCHES)
        except PlanError as error:
            pytest.skip(str(error))  # the GPU has no such type
        return build_plan(BuildJob.of(wanted))

    return built


def answers(bundle: Bundle, clips: Frames) -> Outputs:
    """The float32 graph's, on the CPU."""
    reference = OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False)
    try:
        return reference.run(clips)
    finally:
        reference.close()


def parity(expected: Outputs, runtime: Runtime, clips: Frames) -> Parity:
    batch = len(clips)
    wanted = Outputs(expected.logits[:batch], expected.embedding[:batch])
    return compare(wanted, runtime.run(clips), LIMITS[runtime.precision])


def assert_proven(runtime: Runtime, bundle: Bundle) -> None:
    """As the service does, before an engine answers anyone."""
    found = Proof.of(bundle).judge(runtime)
    assert found.passed, found


class TestPlans:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_each_precision_passes_the_gate_at_every_batch(
        self, here: TensorRt, bundle: Bundle, clips: Frames, plan: Plans, precision: str
    ) -> None:
        runtime = here.load(plan(precision), LARGEST)
        try:
            assert runtime.precision == precision
            assert_proven(runtime, bundle)
            expected = answers(bundle, clips)
            for batch in range(1, len(clips) + 1):
                found = parity(expected, runtime, clips[:batch])
                assert found.passed, f"batch {batch}: {found}"
        finally:
            runtime.close()

    def test_batches_of_two_threads_at_once_answer_as_one_alone(
        self, here: TensorRt, clips: Frames, plan: Plans
    ) -> None:
        runtime = here.load(plan("fp16"), LARGEST)
        try:
            alone = {size: runtime.run(clips[-size:]) for size in range(1, LARGEST + 1)}

            def work(turn: int) -> None:
                size = 1 + turn % LARGEST
                found = runtime.run(clips[-size:])
                for one, other in zip(alone[size], found, strict=True):
                    np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)

            for count in (runtime.slots, 2 * runtime.slots):
                with ThreadPoolExecutor(count) as threads:
                    list(threads.map(work, range(400)))
        finally:
            runtime.close()

    def test_what_was_measured_for_one_build_is_used_by_the_next(
        self, here: TensorRt, versions: tuple[Bundle, Bundle], plan: Plans
    ) -> None:
        (kept,) = plan("fp16").path.parent.glob("*.timings")
        assert kept.stat().st_size > 0
        job = BuildJob.of(here.wanted(versions[1], "fp16", BATCHES))
        assert kept in job.earlier_timings
        assert build_plan(job).facts.warnings == ()

    def test_measurements_that_are_damaged_are_begun_anew(
        self, here: TensorRt, bundle: Bundle, clips: Frames, tmp_path: Path
    ) -> None:
        elsewhere = TensorRt(engines=tmp_path)
        wanted = elsewhere.wanted(bundle, "fp16", (1,))
        job = BuildJob.of(wanted)
        assert job.timings is not None
        job.timings.parent.mkdir(parents=True)
        job.timings.write_bytes(b"no measurements")
        built = build_plan(job)
        assert any("begun anew" in warning for warning in built.facts.warnings)
        runtime = elsewhere.load(built, 1)
        assert parity(answers(bundle, clips[:1]), runtime, clips[:1]).passed
        runtime.close()

    def test_a_version_of_other_weights_is_refitted_and_has_its_own_answers(
        self, versions: tuple[Bundle, Bundle], clips: Frames, tmp_path: Path
    ) -> None:
        elsewhere = TensorRt(engines=tmp_path)
        for bundle, refitted in zip(versions, (False, True), strict=True):
            wanted = elsewhere.wanted(bundle, "fp16", BATCHES)
            built = build_plan(BuildJob.of(wanted, refittable=True))
            assert (built.facts.refittable, built.facts.refitted) == (True, refitted)
            runtime = elsewhere.load(built, LARGEST)
            assert_proven(runtime, bundle)
            assert parity(answers(bundle, clips), runtime, clips).passed
            runtime.close()

    def test_the_fastest_precision_is_measured_and_then_taken(
        self, here: TensorRt, bundle: Bundle
    ) -> None:
        def build(precision: str) -> Plan:
            return build_plan(BuildJob.of(here.wanted(bundle, precision, BATCHES)))

        found = measure_fastest(bundle, here, BATCHES, LARGEST, build, rounds=2)
        assert found.milliseconds.keys() | found.refused.keys() == set(PRECISIONS)
        assert found.milliseconds.keys() >= {"float32", "fp16"}
        assert here.wanted(bundle, "auto", BATCHES).key.precision == found.order[0]

    def test_the_gate_runs_all_of_a_bundle_that_can_run_there(
        self, here: TensorRt, bundle: Bundle, clips: Frames, plan: Plans
    ) -> None:
        built = {plan(precision).path.name for precision in ("float32", "fp16")}
        verdict = check_bundle(bundle, clips, device="cuda", engines=here.engines)
        assert [each for each in verdict.checked if not each.passed] == []
        on_gpu = {Path(each.artefact).name for each in verdict.checked if each.device == "cuda"}
        assert on_gpu >= {*built, ONNX_FLOAT32, ONNX_FP16}


class TestMemory:
    def test_loading_and_closing_again_and_again_takes_no_more(
        self, here: TensorRt, clips: Frames, plan: Plans
    ) -> None:
        built = plan("fp16")
        free = []
        for _ in range(30):  # one of a network so small takes little
            runtime = here.load(built, LARGEST)
            runtime.run(clips)
            runtime.close()
            free.append(here.cuda.free_bytes())
        assert min(free[1:]) > free[1] - SLACK, "the first load brings TensorRT's own along"

    def test_a_swap_frees_the_old_one_while_the_new_one_works(
        self, here: TensorRt, bundle: Bundle, clips: Frames, plan: Plans
    ) -> None:
        built, expected = plan("fp16"), answers(bundle, clips)
        old = here.load(built, LARGEST)
        before = here.cuda.free_bytes()
        new = here.load(built, LARGEST)
        stop = threading.Event()

        def work() -> int:
            done = 0
            while not stop.is_set():
                assert parity(expected, new, clips[: 1 + done % LARGEST]).passed
                done += 1
            return done

        with ThreadPoolExecutor(2) as threads:
            working = [threads.submit(work) for _ in range(2)]
            try:
                old.run(clips)
                old.close()
                freed = here.cuda.free_bytes()
                third = here.load(built, LARGEST)
                assert parity(expected, third, clips).passed
                third.close()
            finally:
                stop.set()
            assert min(each.result() for each in working) > 0
        assert freed > before - SLACK, "one is there, as before"
        new.close()


class TestOnnxRuntime:
    @pytest.mark.parametrize("precision", ["float32", "fp16"])
    def test_on_cuda_it_answers_as_on_the_cpu(
        self, here: TensorRt, bundle: Bundle, clips: Frames, precision: str
    ) -> None:
        runtime = OnnxRuntime(bundle.file(GRAPHS[precision]), cuda=True, precision=precision)
        expected = answers(bundle, clips)
        for batch in range(1, len(clips) + 1):
            found = parity(expected, runtime, clips[:batch])
            assert found.passed, f"batch {batch}: {found}"
        runtime.close()
