"""What the metrics say of a running service: what alerts and dashboards are made of."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import codes
from service.jobs.runner import PARAMETERS
from service.jobs.store import STATES
from service.observability.metrics import Metrics

DEMO = (("model", "demo"),)


def samples(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of `/metrics`, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def test_an_idle_service_reports_all_that_alerts_watch(serve: Any, tmp_path: Path) -> None:
    """Counters, queues and disks are there before the first request."""
    limits = {"max_queue_clips": 77, "decode_workers": 3}
    with serve(jobs_dir=tmp_path / "jobs", spool_dir=tmp_path, **limits) as client:
        found = samples(client)
    for result in ("done", "refused"):
        assert found["timesformer_swaps_total", (*DEMO, ("result", result))] == 0
    for reason in ("decoding_timeout", "decoder_crashed"):
        assert found["timesformer_decoder_restarts_total", (("reason", reason),)] == 0
    for code in codes():
        assert found["timesformer_rejected_total", (("code", code),)] == 0
    assert found["timesformer_active_bundle_refused", DEMO] == 0
    for kind in PARAMETERS:
        for state in set(STATES) - {"queued", "running"}:
            labels = (("kind", kind), ("state", state))
            assert found["timesformer_jobs_ended_total", labels] == 0
    for result in ("done", "failed", "given_up"):
        assert found["timesformer_webhooks_total", (("result", result),)] == 0
    for state in STATES:
        assert found["timesformer_jobs", (("state", state),)] == 0
    assert found["timesformer_queue_limit_clips", DEMO] == 77
    assert found["timesformer_queue_age_seconds", DEMO] == 0
    assert found["timesformer_decoders", ()] == 3
    assert found["timesformer_decoders_busy", ()] == 0
    assert found["timesformer_decode_waiting", ()] == 0
    size = shutil.disk_usage(tmp_path).total
    for volume in ("spool", "jobs", "store"):
        assert found["timesformer_disk_free_bytes", (("volume", volume),)] > 0
    assert found["timesformer_disk_size_bytes", (("volume", "spool"),)] == size


def test_what_was_sent_and_what_the_engine_did_is_counted(
    serve: Any, video: Path, tmp_path: Path
) -> None:
    content = video.read_bytes()
    with serve(spool_dir=tmp_path) as client:
        client.post("/v1/classify?views=3", content=content).raise_for_status()
        found = samples(client)
    assert found["timesformer_videos_total", (("codec", "h264"),)] == 1
    assert found["timesformer_upload_bytes_sum", ()] == len(content)
    assert found["timesformer_video_seconds_sum", ()] == pytest.approx(2.0)
    assert found["timesformer_video_short_side_pixels_sum", ()] == 64
    assert found["timesformer_request_clips_sum", ()] == 3
    batches = found["timesformer_batch_clips_count", DEMO]
    assert found["timesformer_batch_seconds_count", DEMO] == batches > 0
    for stage in ("upload", "decode", "queue", "inference", "total"):
        assert found["timesformer_stage_seconds_count", (*DEMO, ("stage", stage))] == 1


def test_a_folder_that_is_gone_does_not_take_the_other_metrics_along(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.watch_disk("spool", tmp_path / "gone")
    metrics.render()
    found = metrics.registry.get_sample_value("timesformer_disk_free_bytes", {"volume": "spool"})
    assert found is not None
    assert math.isnan(found)


def test_a_codec_that_nobody_knows_makes_no_label_of_its_own(
    serve: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.video_requests.CODECS", frozenset({"hevc"}))
    with serve(spool_dir=tmp_path) as client:
        client.post("/v1/classify", content=video.read_bytes()).raise_for_status()
        text = client.get("/metrics").text
    assert 'timesformer_videos_total{codec="other"} 1.0' in text
    assert "h264" not in text
