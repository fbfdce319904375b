"""The TensorRT runtime on two made-up GPUs: every call is made on the one that it is for.

A real driver takes many calls for the wrong GPU without a word: memory is then taken on the other
one, and work waits for streams that are not its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import Plan
from export.runtime.tensorrt import TensorRtRuntime
from tests.export.runtime.fake_cuda import FakeCuda, fake_gpus
from tests.export.runtime.test_tensorrt import check, clips, plan, runtime_on

__all__ = ["plan"]  # a fixture


@pytest.fixture
def gpus() -> tuple[FakeCuda, ...]:
    return fake_gpus(2)


@pytest.fixture
def runtimes(gpus: tuple[FakeCuda, ...], plan: Plan) -> Iterator[list[TensorRtRuntime]]:
    """One on each, loaded by the same thread, the last one's GPU still being its own."""
    loaded = [runtime_on(gpu, plan) for gpu in gpus]
    yield loaded
    for runtime in loaded:
        runtime.close()
    assert [gpu.leaks() for gpu in gpus] == [[], []]


def test_a_thread_may_use_them_in_turn(
    runtimes: list[TensorRtRuntime], gpus: tuple[FakeCuda, ...]
) -> None:
    assert [runtime.gpu for runtime in runtimes] == [0, 1]
    for seed in range(6):
        for runtime in runtimes:
            check(runtime, clips(1 + seed % 6, seed))
    assert [gpu.launches for gpu in gpus] == [6, 6]


def test_many_threads_use_both_at_once(
    runtimes: list[TensorRtRuntime], gpus: tuple[FakeCuda, ...]
) -> None:
    def work(seed: int) -> None:
        check(runtimes[seed % 2], clips(1 + seed % 6, seed))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(64)))
    assert [gpu.launches for gpu in gpus] == [32, 32]


def test_one_is_closed_while_the_thread_is_on_the_other(
    gpus: tuple[FakeCuda, ...], plan: Plan
) -> None:
    first, second = (runtime_on(gpu, plan) for gpu in gpus)
    check(second, clips(2))
    first.close()
    assert gpus[0].leaks() == []
    check(second, clips(2))
    second.close()
    assert gpus[1].leaks() == []


def test_a_new_version_is_loaded_on_one_while_the_other_works(
    runtimes: list[TensorRtRuntime], gpus: tuple[FakeCuda, ...], plan: Plan
) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            check(runtimes[1], clips(3))

    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        try:
            new = runtime_on(gpus[0], plan)
            runtimes[0].close()
            check(new, clips(4))
        finally:
            stop.set()
        working.result()
    runtimes[0] = new


def test_a_load_that_fails_on_one_leaves_nothing_on_either(plan: Plan) -> None:
    first, second = fake_gpus(2)
    loaded = runtime_on(first, plan)
    second.fail = "pinned"
    with pytest.raises(RuntimeUnavailableError, match="out of luck"):
        runtime_on(second, plan)
    assert second.leaks() == []
    check(loaded, clips(1))
    loaded.close()
    assert first.leaks() == []
