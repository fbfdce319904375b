"""The end-to-end test that `make test` runs."""

from __future__ import annotations

import signal
from pathlib import Path

from model.demo import SAMPLE_CLIP
from tests.e2e.conftest import StartService


def test_service_labels_the_sample_clip_without_torch_and_stops(
    start_service: StartService,
) -> None:
    with start_service() as service:
        answer = service.client.post("/v1/classify", content=SAMPLE_CLIP.read_bytes()).json()
        best = answer["predictions"][0]
        assert (best["label"], best["score"] > 0.5) == ("turning clockwise", True)
        libraries = Path(f"/proc/{service.process.pid}/maps").read_text()
        assert "onnxruntime" in libraries
        assert "libtorch" not in libraries
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait() == 0
    assert "curl -F file=@" in "".join(service.log)  # what a user may try
