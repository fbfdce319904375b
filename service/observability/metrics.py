"""Prometheus metrics. Each is defined here once; `docs/reference.md` is made from these.

Gauges of what a part of the service knows are functions, asked when `/metrics` is.
Values of labels come from lists in the code and from the store, never from what a client sends.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from service.inference.scheduler import DROPPED
from service.observability.gpu import GpuCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_MIB = 1024 * 1024
SWAP_RESULTS = ("done", "refused")
JOB_KINDS = ("classify", "timeline", "embed")
JOB_ENDS = ("done", "failed", "cancelled")
WEBHOOK_RESULTS = ("done", "failed", "given_up")
CANDIDATE_RESULTS = ("agreed", "differed", "dropped", "answered", "busy", "failed")
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
            ["model", "stage"],
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
            ["model"],
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128),
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "timesformer_batch_seconds",
            "Time that the engine took for a batch; the rate of its sum is how busy the engine is.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batches_running = Gauge(
            "timesformer_batches_running",
            "Batches that an engine is at, by the engine's number; two overlap where it can.",
            ["model", "engine", "device"],
            registry=self.registry,
        )
        self.engines_healthy = Gauge(
            "timesformer_engines_healthy",
            "Engines that are in use and do not fail on every request.",
            ["model"],
            registry=self.registry,
        )
        self.engines_removed = Counter(
            "timesformer_engines_removed",
            "Engines taken out because they failed on requests that others could do.",
            ["model"],
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "timesformer_queue_seconds",
            "Time that an answered request waited for the engine, by its priority.",
            ["priority"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.dropped = Counter(
            "timesformer_dropped",
            "Requests whose waiting clips were not run: the client left, the deadline passed, or "
            "requests of another priority displaced them from a full queue.",
            ["reason"],
            registry=self.registry,
        )
        self.queue_clips = Gauge(
            "timesformer_queue_clips",
            "Clips that wait for the engine.",
            ["model"],
            registry=self.registry,
        )
        self.queue_limit_clips = Gauge(
            "timesformer_queue_limit_clips",
            "Clips that may wait for the engine; past that requests are refused.",
            ["model"],
            registry=self.registry,
        )
        self.queue_age_seconds = Gauge(
            "timesformer_queue_age_seconds",
            "How long the oldest request has waited for the engine; grows when the engine hangs.",
            ["model"],
            registry=self.registry,
        )
        self.decoders = Gauge("timesformer_decoders", "Decoder workers.", registry=self.registry)
        self.decoders_busy = Gauge(
            "timesformer_decoders_busy", "Decoder workers at a video.", registry=self.registry
        )
        self.decode_waiting = Gauge(
            "timesformer_decode_waiting",
            "Videos that wait for a decoder worker.",
            registry=self.registry,
        )
        self.decoder_restarts = Counter(
            "timesformer_decoder_restarts",
            "Decoder workers replaced after a failure, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.decode_sandbox = Gauge(
            "timesformer_decode_sandbox",
            "1 for each layer of the kernel that holds the decoder workers in.",
            ["layer"],
            registry=self.registry,
        )
        self.model_info = Gauge(
            "timesformer_model_info",
            "1 for each bundle that serves and each device (`cpu`, `cuda:0`), with what runs it.",
            ["model", "version", "engine", "provider", "device", "precision"],
            registry=self.registry,
        )
        self.tensorrt = Gauge(
            "timesformer_tensorrt",
            "1 for TensorRT's status: serving, building, missing, failed, unavailable or off.",
            ["model", "state"],
            registry=self.registry,
        )
        self.swaps = Counter(
            "timesformer_swaps",
            "Newly activated bundles that took over (done) or could not be used (refused).",
            ["model", "result"],
            registry=self.registry,
        )
        self.active_bundle_refused = Gauge(
            "timesformer_active_bundle_refused",
            "1 while the store's active version cannot be used and an earlier one serves.",
            ["model"],
            registry=self.registry,
        )
        self.store_behind = Gauge(
            "timesformer_store_behind",
            "1 while the store at TIMESFORMER_STORE_URL does not answer, or its active version "
            "cannot be fetched; what was fetched before serves.",
            registry=self.registry,
        )
        self.candidate_share = Gauge(
            "timesformer_candidate_share",
            "Share of the requests that a candidate version is tried with, while it is.",
            ["model", "version", "mode"],
            registry=self.registry,
        )
        self.candidate_refused = Gauge(
            "timesformer_candidate_refused",
            "1 while the candidate in the store is not tried: it could not be loaded, or failed.",
            ["model"],
            registry=self.registry,
        )
        self.candidate_requests = Counter(
            "timesformer_candidate_requests",
            "Requests that a candidate version was tried with. As a shadow: agreed or differed in "
            "the best label, or dropped for want of time. As a canary: answered, or busy, which "
            "the serving version answered. Both: failed, which ends the trial.",
            ["model", "result"],
            registry=self.registry,
        )
        self.candidate_score_difference = Histogram(
            "timesformer_candidate_score_difference",
            "How far a shadow's scores are from those that were answered: half the sum of the "
            "differences, 0 for the same and 1 for nothing in common.",
            ["model"],
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
            registry=self.registry,
        )
        self.candidate_seconds = Histogram(
            "timesformer_candidate_seconds",
            "Queue and inference of a request in a candidate version.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.upload_bytes = Histogram(
            "timesformer_upload_bytes",
            "Size of an answered request's video.",
            buckets=[
                _MIB * size for size in (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 1000)
            ],
            registry=self.registry,
        )
        self.video_seconds = Histogram(
            "timesformer_video_seconds",
            "Length of an answered request's video.",
            buckets=(1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200),
            registry=self.registry,
        )
        self.video_short_side_pixels = Histogram(
            "timesformer_video_short_side_pixels",
            "Short side of an answered request's video.",
            buckets=(144, 240, 360, 480, 720, 1080, 1440, 2160, 4320),
            registry=self.registry,
        )
        self.videos = Counter(
            "timesformer_videos",
            "Videos of answered requests, by codec.",
            ["codec"],
            registry=self.registry,
        )
        self.request_clips = Histogram(
            "timesformer_request_clips",
            "Clips of an answered request (views x crops).",
            buckets=(1, 2, 3, 5, 10, 15, 30, 60, 100),
            registry=self.registry,
        )
        self.jobs = Gauge(
            "timesformer_jobs",
            "Jobs that are kept, by state.",
            ["state"],
            registry=self.registry,
        )
        self.jobs_ended = Counter(
            "timesformer_jobs_ended",
            "Jobs that ended, by kind and state.",
            ["kind", "state"],
            registry=self.registry,
        )
        self.jobs_put_off = Counter(
            "timesformer_jobs_put_off",
            "Runs of jobs that the service had no room or means for at the moment; they are tried "
            "again.",
            ["kind"],
            registry=self.registry,
        )
        self.job_seconds = Histogram(
            "timesformer_job_seconds",
            "Time that a job ran, by kind.",
            ["kind"],
            buckets=(0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 14400),
            registry=self.registry,
        )
        self.jobs_bytes = Gauge(
            "timesformer_jobs_bytes",
            "Videos and results that jobs keep, or that are being received or written for them.",
            registry=self.registry,
        )
        self.webhooks = Counter(
            "timesformer_webhooks",
            "Calls of webhooks: done, failed and to be tried again, or given up.",
            ["result"],
            registry=self.registry,
        )
        self.source_seconds = Histogram(
            "timesformer_source_seconds",
            "Time to read a video from its URL, by what came of it: done, failed or refused.",
            ["result"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.timelines_running = Gauge(
            "timesformer_timelines_running",
            "Timelines that are being received, decoded or sent.",
            registry=self.registry,
        )
        self.timelines_waiting = Gauge(
            "timesformer_timelines_waiting",
            "Timelines that wait for a decoder process.",
            registry=self.registry,
        )
        self.timeline_windows = Counter(
            "timesformer_timeline_windows",
            "Windows of long videos that have been answered.",
            registry=self.registry,
        )
        self.timeline_segments = Counter(
            "timesformer_timeline_segments",
            "Segments that these windows made.",
            registry=self.registry,
        )
        self.disk_free_bytes = Gauge(
            "timesformer_disk_free_bytes",
            "Room left where uploads (spool), bundles (store) and jobs (jobs) lie.",
            ["volume"],
            registry=self.registry,
        )
        self.disk_size_bytes = Gauge(
            "timesformer_disk_size_bytes",
            "Size of the file systems of spool, store and jobs.",
            ["volume"],
            registry=self.registry,
        )
        self.spool_bytes = Gauge(
            "timesformer_spool_bytes",
            "Bytes of the uploads that are being received or decoded.",
            registry=self.registry,
        )
        self.tensor_bytes = Gauge(
            "timesformer_tensor_bytes",
            "Bytes in memory of requests with clips that were sent ready.",
            registry=self.registry,
        )
        self.ready = Gauge(
            "timesformer_ready",
            "1 while the service accepts work and an engine of it can do some.",
            registry=self.registry,
        )
        self.start_seconds = Gauge(
            "timesformer_start_seconds",
            "What the start took, by stage: imports, store (a copy of one at a URL), then models "
            "and decoders side by side; total is from the start of the process until it listened.",
            ["stage"],
            registry=self.registry,
        )
        self._stages: dict[tuple[str, str], Histogram] = {}
        self.registry.register(GpuCollector())
        for reason in DROPPED:
            self.dropped.labels(reason)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def of_stage(self, model: str, stage: str) -> Histogram:
        """`stage_seconds` of one stage; found faster than by its labels."""
        found = self._stages.get((model, stage))
        if found is None:
            found = self._stages[model, stage] = self.stage_seconds.labels(model, stage)
        return found

    def add_model(self, name: str) -> None:
        """Begins a model's counters at 0: an alert sees a rise only of what was there before."""
        for result in SWAP_RESULTS:
            self.swaps.labels(name, result)
        for result in CANDIDATE_RESULTS:
            self.candidate_requests.labels(name, result)
        for metric in (
            self.active_bundle_refused,
            self.candidate_refused,
            self.candidate_score_difference,
            self.candidate_seconds,
            self.engines_removed,
        ):
            metric.labels(name)

    def add_jobs(self, folder: Path) -> None:
        """Begins the counters of jobs at 0, and reports the disk that they are kept on."""
        for kind in JOB_KINDS:
            self.jobs_put_off.labels(kind)
            for state in JOB_ENDS:
                self.jobs_ended.labels(kind, state)
        for result in WEBHOOK_RESULTS:
            self.webhooks.labels(result)
        self.watch_disk("jobs", folder)

    def start_stages(self) -> dict[str, float]:
        """Seconds of each stage of the start."""
        (family,) = self.start_seconds.collect()
        return {sample.labels["stage"]: sample.value for sample in family.samples}

    def watch_disk(self, volume: str, folder: Path) -> None:
        """Reports the file system of `folder` as `volume`."""

        def usage(field: str) -> Callable[[], float]:
            def ask() -> float:
                try:
                    return float(getattr(shutil.disk_usage(folder), field))
                except OSError:  # the folder is gone; the other metrics must not go with it
                    return math.nan

            return ask

        self.disk_free_bytes.labels(volume).set_function(usage("free"))
        self.disk_size_bytes.labels(volume).set_function(usage("total"))

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
