"""The service on a real GPU: `make test-gpu`. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.bundle.bundle import BundleStore
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.tensorrt import TensorRt
from tests.service.conftest import Serve
from tests.service.registry.fake_gpu import label, state
from tests.service.registry.test_models import metric, serving, store, wait_until

__all__ = ["store"]  # a fixture

# A plan is built in a minute or a few.
BUILT = 600
SLACK = 32 << 20


@pytest.fixture
def gpu() -> TensorRt:
    try:
        return TensorRt()
    except RuntimeUnavailableError as error:
        pytest.skip(f"no GPU: {error}")


@pytest.mark.timeout(3 * BUILT)
def test_it_builds_while_onnx_runtime_serves_swaps_and_frees_what_it_held(
    gpu: TensorRt, serve: Serve, store: BundleStore, video: Path, tmp_path: Path
) -> None:
    settings = {"device": "cuda", "engines": tmp_path / "engines", "watch_interval_s": 0.05}
    with serve(store=store.root, spool_dir=tmp_path, **settings) as client:
        first = label(client, video)
        wait_until(lambda: state(client) == ("tensorrt", "serving"), seconds=BUILT)
        assert label(client, video) == first
        held = []
        for count, version in enumerate(("2", "1") * 5, start=1):
            store.activate("demo", version)
            wait_until(lambda version=version: serving(client) == version, seconds=BUILT)
            wait_until(lambda: state(client) == ("tensorrt", "serving"), seconds=BUILT)
            assert label(client, video) == first.replace("1: ", f"{version}: ")
            assert metric(client, 'timesformer_swaps_total{model="demo",result="done"}') == count
            held.append(gpu.cuda.free_bytes())
        # Each version frees what the one before it held, as soon as its last batch is through.
        wait_until(lambda: gpu.cuda.free_bytes() > held[1] - SLACK, seconds=60)
        ready = client.get("/health/ready").json()
        assert [engine["healthy"] for engine in ready["engines"]] == [True]
