"""The TensorRT runtime's order of copies, launches and frees, on a device that forgives nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.runtime.cuda import Cuda
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import Plan, PlanKey
from export.runtime.tensorrt import TensorRt, TensorRtRuntime
from tests.export.conftest import plan_facts
from tests.export.runtime.fake_cuda import FakeCuda, fake_tensorrt

BATCHES = (1, 4, 6)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = tmp_path / "some.plan"
    path.write_bytes(b"a plan")
    key = PlanKey(
        gpu="Fake GPU",
        compute_capability="9.0",
        tensorrt="11.4.0.106",
        precision="fp16",
        batches=BATCHES,
    )
    return Plan(path, plan_facts(key, "0" * 64))


def runtime_on(cuda: FakeCuda, plan: Plan, largest: int = 6, loads: bool = True) -> TensorRtRuntime:
    trt: Any = fake_tensorrt(cuda, BATCHES, loads)
    return TensorRtRuntime(plan, cuda, largest, trt)


def clips(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 16, 16, 3), dtype=np.uint8)


def check(runtime: TensorRtRuntime, frames: np.ndarray) -> None:
    outputs = runtime.run(frames)
    expected = frames.mean(axis=(1, 2, 3)) / 64
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5)
    np.testing.assert_allclose(outputs.embedding[:, 0], expected.sum(axis=1), rtol=1e-5)


def test_every_batch_is_one_launch_and_the_right_answer(plan: Plan) -> None:
    cuda = FakeCuda()
    runtime = runtime_on(cuda, plan)
    assert (runtime.engine, runtime.device, runtime.precision) == ("tensorrt", "cuda", "fp16")
    assert runtime.provider == "TensorRT 11.4.0.106"
    assert cuda.launches == 0
    for batch in (*range(1, 7), 1, 6, 2):
        check(runtime, clips(batch, seed=batch))
    assert cuda.launches == 9
    runtime.close()


def test_batches_beyond_the_largest_run_in_parts(plan: Plan) -> None:
    cuda = FakeCuda()
    check(runtime_on(cuda, plan), clips(15))
    assert cuda.launches == 3
    cuda = FakeCuda()
    check(runtime_on(cuda, plan, largest=4), clips(5))
    assert cuda.launches == 2


def test_answers_are_copies_that_the_next_batch_does_not_change(plan: Plan) -> None:
    runtime = runtime_on(FakeCuda(), plan)
    first = runtime.run(clips(3, seed=1))
    kept = first.logits.copy(), first.embedding.copy()
    for seed in range(2, 6):
        runtime.run(clips(3, seed=seed))
    runtime.close()
    np.testing.assert_array_equal(first.logits, kept[0])
    np.testing.assert_array_equal(first.embedding, kept[1])


def test_two_batches_are_on_their_way_at_once_and_do_not_mix(plan: Plan) -> None:
    cuda = FakeCuda()
    runtime = runtime_on(cuda, plan)
    both = threading.Barrier(2)
    cuda.before_synchronize = lambda: both.wait(300) and None
    with ThreadPoolExecutor(2) as threads:
        for turn in range(20):
            batches = [clips(1 + turn % 6, seed=turn), clips(1 + turn % 4, seed=100 + turn)]
            list(threads.map(lambda frames: check(runtime, frames), batches))
    assert cuda.most_streams_at_once == 2
    cuda.before_synchronize = lambda: None
    runtime.close()
    assert cuda.leaks() == []


def test_many_threads_may_run_it(plan: Plan) -> None:
    cuda = FakeCuda()
    runtime = runtime_on(cuda, plan)
    with ThreadPoolExecutor(8) as threads:
        batches = [clips(1 + seed % 6, seed=seed) for seed in range(64)]
        list(threads.map(lambda frames: check(runtime, frames), batches))


@pytest.mark.parametrize("call", ["allocate", "pinned", "stream", "event", "begin_capture"])
def test_a_device_that_fails_while_loading_is_an_error_and_leaves_nothing(
    plan: Plan, call: str
) -> None:
    cuda = FakeCuda(fail=call)
    with pytest.raises(RuntimeUnavailableError, match=r"some\.plan cannot run: .*out of luck"):
        runtime_on(cuda, plan)
    assert cuda.leaks() == []


@pytest.mark.parametrize("call", ["to_device", "launch", "to_host"])
def test_a_batch_that_fails_costs_itself_only(plan: Plan, call: str) -> None:
    cuda = FakeCuda()
    runtime = runtime_on(cuda, plan)
    cuda.fail = call
    for _ in range(3):  # more often than there are slots
        with pytest.raises(RuntimeError, match="out of luck"):
            runtime.run(clips(2))
    cuda.fail = ""
    check(runtime, clips(2))
    runtime.close()
    assert cuda.leaks() == []


def test_a_plan_that_tensorrt_does_not_load_is_an_error_that_says_why(plan: Plan) -> None:
    cuda = FakeCuda()
    with pytest.raises(RuntimeUnavailableError, match="the plan is of another version"):
        runtime_on(cuda, plan, loads=False)
    assert cuda.leaks() == []


def test_a_tensorrt_that_cannot_start_is_an_error_that_says_why(plan: Plan) -> None:
    """As with a driver that is older than the libraries: the binding's factory gives a nullptr."""
    cuda = FakeCuda()
    trt: Any = fake_tensorrt(cuda, BATCHES)

    def start(log: Any) -> None:
        log.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    trt.Runtime = start
    with pytest.raises(RuntimeUnavailableError, match=r"could not start: CUDA init.*nullptr"):
        TensorRtRuntime(plan, cuda, 6, trt)
    assert cuda.leaks() == []


def test_a_damaged_plan_is_not_given_to_tensorrt(plan: Plan) -> None:
    plan.path.write_bytes(b"a pIan")
    with pytest.raises(RuntimeUnavailableError, match="not the plan that was built"):
        runtime_on(FakeCuda(), plan)


def test_a_plan_of_other_profiles_than_it_says_is_refused(plan: Plan) -> None:
    facts = plan.facts.model_copy(
        update={"key": plan.facts.key.model_copy(update={"batches": (1, 8)})}
    )
    with pytest.raises(RuntimeUnavailableError, match="it has 3 profiles"):
        runtime_on(FakeCuda(), Plan(plan.path, facts))


def test_a_machine_without_a_gpu_is_an_error_that_says_what_is_missing() -> None:
    try:
        Cuda()
    except RuntimeUnavailableError:
        with pytest.raises(RuntimeUnavailableError, match=r"driver|GPU|cuda-bindings"):
            TensorRt()
    else:
        pytest.skip("a GPU is here")
