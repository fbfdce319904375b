"""Metrics of several processes: nothing counted twice, nothing lost with a process."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service.merging import ADDED_GAUGES, LEAST_GAUGES, counted, render, snapshot
from service.metrics import Metrics


def values(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, "a series stands there twice"
            found[key] = sample.value
    return found


def value(text: bytes, name: str, **labels: str) -> float:
    return values(text)[name, frozenset(labels.items())]


def test_counters_and_histograms_are_added_up() -> None:
    engines, first, second = Metrics(), Metrics(), Metrics()
    engines.requests.labels("/metrics", "GET", "200").inc()
    for worker, count in ((first, 2), (second, 3)):
        worker.requests.labels("/v1/classify", "POST", "200").inc(count)
        for _ in range(count):
            worker.stage_seconds.labels("demo", "upload").observe(0.02)
    text = render(engines.registry, [snapshot(first.registry), snapshot(second.registry)])
    labels = {"route": "/v1/classify", "method": "POST", "status": "200"}
    assert value(text, "timesformer_requests_total", **labels) == 5
    assert (
        value(
            text, "timesformer_requests_total", **{**labels, "route": "/metrics", "method": "GET"}
        )
        == 1
    )
    stage = {"model": "demo", "stage": "upload"}
    assert value(text, "timesformer_stage_seconds_count", **stage) == 5
    assert value(text, "timesformer_stage_seconds_bucket", **stage, le="0.025") == 5
    assert value(text, "timesformer_stage_seconds_bucket", **stage, le="0.01") == 0
    assert value(text, "timesformer_stage_seconds_bucket", **stage, le="+Inf") == 5


def test_of_gauges_shares_are_added_and_the_rest_is_that_of_the_engines_process() -> None:
    engines, worker = Metrics(), Metrics()
    engines.ready.set(1)
    engines.spool_bytes.set(10)
    worker.ready.set(1)
    worker.spool_bytes.set(5)
    worker.decoders.set(2)
    text = render(engines.registry, [snapshot(worker.registry)] * 2)
    assert value(text, "timesformer_ready") == 1
    assert value(text, "timesformer_spool_bytes") == 20
    assert value(text, "timesformer_decoders") == 4


def test_a_layer_of_the_sandbox_holds_if_it_does_in_each_process() -> None:
    engines, tight, loose = Metrics(), Metrics(), Metrics()
    tight.decode_sandbox.labels("seccomp").set(1)
    loose.decode_sandbox.labels("seccomp").set(0)
    one, other = snapshot(tight.registry), snapshot(loose.registry)
    for workers, holds in (([one, other], 0), ([other, one], 0), ([one, one], 1)):
        text = render(engines.registry, workers)
        assert value(text, "timesformer_decode_sandbox", layer="seccomp") == holds


def test_what_an_ended_worker_counted_stays_and_what_it_had_goes() -> None:
    engines, worker = Metrics(), Metrics()
    worker.videos.labels("h264").inc(7)
    worker.decoders.set(2)
    departed = counted(snapshot(worker.registry), engines.registry)
    departed = counted([*departed, *snapshot(worker.registry)], engines.registry)
    text = render(engines.registry, [departed])
    assert value(text, "timesformer_videos_total", codec="h264") == 14
    assert value(text, "timesformer_decoders") == 0


def test_the_gauges_that_are_named_exist() -> None:
    families = {family.name: family.type for family in Metrics().registry.collect()}
    assert {families[name] for name in ADDED_GAUGES | LEAST_GAUGES} == {"gauge"}
