"""Prometheus metrics. Each is defined here once; `docs/reference.md` is made from these."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "timesformer_requests",
            "Requests answered, by route template, method and status.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.requests_in_progress = Gauge(
            "timesformer_requests_in_progress",
            "Requests that are being received or answered.",
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "timesformer_stage_seconds",
            "Time of an answered request by stage: upload, decode, queue, inference, total.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.rejected = Counter(
            "timesformer_rejected",
            "Requests refused, by the stable error code of the answer.",
            ["code"],
            registry=self.registry,
        )
        self.batch_clips = Histogram(
            "timesformer_batch_clips",
            "Clips that went through the network together.",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128),
            registry=self.registry,
        )
        self.queue_clips = Gauge(
            "timesformer_queue_clips", "Clips that wait for the engine.", registry=self.registry
        )
        self.decoder_restarts = Counter(
            "timesformer_decoder_restarts",
            "Decoder workers replaced after a failure, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.model_info = Gauge(
            "timesformer_model_info",
            "1 for the bundle that serves, with what runs it.",
            ["name", "version", "engine", "provider", "device", "precision"],
            registry=self.registry,
        )
        self.swaps = Counter(
            "timesformer_swaps",
            "Newly activated bundles that took over (done) or could not be used (refused).",
            ["result"],
            registry=self.registry,
        )
        self.ready = Gauge(
            "timesformer_ready", "1 while the service accepts work.", registry=self.registry
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
