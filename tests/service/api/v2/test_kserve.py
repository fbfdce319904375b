"""KServe's own client, unchanged, from an environment of its own (`make kserve-client`)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

from export.bundle.bundle import BundleStore
from export.runtime import load_runtime
from model.demo import STORE

ROOT = Path(__file__).parents[4]
PYTHON = ROOT / "build/kserve/bin/python"


@pytest.mark.skipif(not PYTHON.exists(), reason="make kserve-client installs it")
def test_kserves_client_gets_what_the_network_says(client: httpx.Client, tmp_path: Path) -> None:
    bundle = BundleStore(STORE).open("demo")
    clips = np.random.default_rng(0).integers(0, 256, (2, 8, 64, 64, 3), np.uint8)
    np.save(tmp_path / "clips.npy", clips)
    url = f"http://{client.base_url.host}:{client.base_url.port}"
    script = ROOT / "tests/kserve/client.py"
    done = subprocess.run(
        [PYTHON, script, url, "demo", tmp_path / "clips.npy"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, True)
    assert found["other_ready"] is False
    expected = load_runtime(bundle, "cpu").run(clips)
    for form in ("binary", "json"):
        answer = found[form]
        assert (answer["id"], answer["model"]) == (form, "demo")
        for name, values in expected._asdict().items():
            got = np.array(answer[name], np.float32).reshape(values.shape)
            np.testing.assert_allclose(got, values, atol=1e-4)
