"""The metrics of several processes as those of one service.

Counters and histograms are added up, with those of processes that have ended: a sum that fell would
look like a restart. Of gauges those that each process has a part of are added up; the others are
what the process with the engines says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

ADDED_GAUGES = frozenset(
    (
        "timesformer_requests_in_progress",
        "timesformer_decoders",
        "timesformer_decoders_busy",
        "timesformer_decode_waiting",
        "timesformer_spool_bytes",
        "timesformer_tensor_bytes",
        "process_virtual_memory_bytes",
        "process_resident_memory_bytes",
        "process_open_fds",
    )
)
LEAST_GAUGES = frozenset(("timesformer_decode_sandbox",))
"""What holds in all processes holds in the service."""
_CREATED = "_created"


class Sample(NamedTuple):
    """One value, as it is sent between processes."""

    family: str
    name: str
    labels: dict[str, str]
    value: float


def snapshot(registry: CollectorRegistry) -> list[Sample]:
    """What a worker has to add."""
    return [
        Sample(family.name, sample.name, sample.labels, sample.value)
        for family in registry.collect()
        if _is_added(family) or family.name in LEAST_GAUGES
        for sample in family.samples
    ]


def counted(samples: Iterable[Sample], registry: CollectorRegistry) -> list[Sample]:
    """What stays of workers that have ended: what they counted, added up."""
    lasting = {family.name for family in registry.collect() if _is_counted(family)}
    return _added_up(sample for sample in samples if sample.family in lasting)


def render(registry: CollectorRegistry, others: Iterable[Sequence[Sample]]) -> bytes:
    """The registry's metrics with those of other processes, in the Prometheus text format."""
    added: dict[str, list[Sample]] = {}
    for samples in others:
        for sample in samples:
            added.setdefault(sample.family, []).append(sample)
    return generate_latest(_Merged(registry, added))


class _Merged(Collector):
    def __init__(self, registry: CollectorRegistry, added: dict[str, list[Sample]]) -> None:
        self._registry = registry
        self._added = added

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            yield _with(family, self._added.get(family.name, []))


def _with(family: Metric, added: Sequence[Sample]) -> Metric:
    if not added:
        return family
    ours = [Sample(family.name, item.name, item.labels, item.value) for item in family.samples]
    merged = Metric(family.name, family.documentation, family.type)
    for sample in _added_up((*ours, *added)):
        merged.add_sample(sample.name, sample.labels, sample.value)
    return merged


def _added_up(samples: Iterable[Sample]) -> list[Sample]:
    sums: dict[tuple[str, frozenset[tuple[str, str]]], Sample] = {}
    for sample in samples:
        key = sample.name, frozenset(sample.labels.items())
        known = sums.get(key)
        if known is None:
            sums[key] = sample
        elif sample.name.endswith(_CREATED) or sample.family in LEAST_GAUGES:
            sums[key] = known._replace(value=min(known.value, sample.value))
        else:
            sums[key] = known._replace(value=known.value + sample.value)
    return list(sums.values())


def _is_counted(family: Metric) -> bool:
    return family.type in {"counter", "histogram"}


def _is_added(family: Metric) -> bool:
    return _is_counted(family) or family.name in ADDED_GAUGES
