"""The simulator, held to what queueing theory says of the queues that it can solve."""

from __future__ import annotations

import math

import pytest

from tests.benchmarks.queue_simulator import (
    BatchCurve,
    Result,
    Service,
    constant,
    drawn_from,
    exponential,
    simulate,
)

VIDEOS = 60_000
AT_ONCE = constant(0.0)


def engine(seconds: float, **changes: object) -> Service:
    """An engine that takes one clip at a time, behind decoders that cost nothing."""
    fields = {"decode_s": AT_ONCE, "decoders": 1, "batch_s": lambda clips: seconds, "max_batch": 1}
    return Service(**{**fields, "max_queue": 10**9, **changes})


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_engine_with_constant_times_is_m_d_1(load: float) -> None:
    """Mean wait rho / (2 mu (1 - rho)): Pollaczek and Khinchine."""
    result = simulate(engine(1.0), rate=load, videos=VIDEOS)
    assert result.mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)
    assert result.inferring_s / result.seconds == pytest.approx(load, rel=0.03)


@pytest.mark.parametrize("servers", [1, 4, 12])
def test_decoders_with_exponential_times_are_m_m_c(servers: int) -> None:
    """Mean wait by Erlang's C formula."""
    load = 0.8
    offered = load * servers
    waits = offered**servers / math.factorial(servers) / (1 - load)
    waits /= sum(offered**k / math.factorial(k) for k in range(servers)) + waits
    service = Service(
        decode_s=exponential(1.0),
        decoders=servers,
        batch_s=lambda clips: 0.0,
        max_batch=1,
    )
    result = simulate(service, rate=offered, videos=VIDEOS)
    assert result.mean == pytest.approx(1 + waits / (servers * (1 - load)), rel=0.06)
    assert result.decoding_s / result.seconds / servers == pytest.approx(load, rel=0.03)


def test_several_engines_share_one_queue() -> None:
    """M/D/c lies between half of M/M/c and all of it; here the engines are never all idle."""
    one = simulate(engine(1.0, engines=1), rate=0.8, videos=VIDEOS)
    four = simulate(engine(1.0, engines=4), rate=3.2, videos=VIDEOS)
    assert 1.0 < four.mean < one.mean
    assert four.throughput == pytest.approx(3.2, rel=0.03)


def test_an_engine_with_too_much_to_do_runs_full_batches_and_refuses_the_rest() -> None:
    curve = BatchCurve((1, 8), (0.3, 1.0))
    service = engine(0.0, batch_s=curve, max_batch=8, max_queue=64)
    result = simulate(service, rate=16.0, videos=VIDEOS)
    assert result.mean_batch == pytest.approx(8, rel=0.01)
    assert result.throughput == pytest.approx(8.0, rel=0.02)
    assert result.refused_share == pytest.approx(0.5, abs=0.02)
    assert result.percentile(0.99) <= 64 / 8 + 2  # the whole queue, its own batch, the one before


def test_with_little_to_do_a_video_takes_its_own_time() -> None:
    service = Service(constant(0.2), 4, BatchCurve((1, 8), (0.3, 1.0)), 8, overhead_s=0.05)
    result = simulate(service, rate=0.01, videos=500)
    assert result.percentile(0.5) == pytest.approx(0.55)
    assert result.mean_batch == pytest.approx(1, abs=0.1)


def test_clips_of_one_video_are_batched_with_those_of_others_in_turn() -> None:
    """Two videos of a hundred clips share the batches: both are done after all of them."""
    service = engine(0.0, batch_s=lambda clips: 1.0, max_batch=10)
    whole = simulate(service, rate=1e-6, videos=50, clips=100)
    assert whole.mean == pytest.approx(10.0)
    pair = simulate(service, rate=1e9, videos=2, clips=100)
    assert max(pair.latencies) == pytest.approx(20.0)


def test_after_a_batch_an_engine_waits_for_as_many_again() -> None:
    """At a high rate the wait fills batches that would otherwise begin with one clip."""
    eager = engine(0.0, batch_s=lambda clips: 0.010, max_batch=64, settle_s=0.0)
    settling = engine(0.0, batch_s=lambda clips: 0.010, max_batch=64, settle_s=0.005)
    sizes = [simulate(each, rate=300.0, videos=VIDEOS).mean_batch for each in (eager, settling)]
    assert sizes[1] > sizes[0] * 1.1


def test_a_curve_goes_through_its_points_and_straight_on() -> None:
    curve = BatchCurve.parse("8:0.030,1:0.010,16:0.050")
    assert [curve(size) for size in (1, 8, 16)] == [0.010, 0.030, 0.050]
    assert curve(12) == pytest.approx(0.040)
    assert curve(24) == pytest.approx(0.070)
    assert BatchCurve((4,), (0.4,))(2) == pytest.approx(0.2)


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> Result:
        service = engine(0.0, decode_s=drawn_from([0.1, 0.5, 0.9]), batch_s=lambda clips: 0.1)
        return simulate(service, rate=1.0, videos=200, seed=seed)

    assert run(1) == run(1) != run(2)
