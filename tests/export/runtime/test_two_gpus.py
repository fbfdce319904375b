"""The TensorRT runtime on two made-up GPUs: every call is made on the one that it is for.

A real driver takes many calls for the wrong GPU without a word: memory is then taken on the other
one, and work waits for streams that are not its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

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
