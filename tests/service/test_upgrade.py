"""What the version before wrote is read: its jobs, API keys, bundles and plans. The files of
`upgrade/` were written by commit bb8f5df."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

from export.bundle.bundle import BundleStore
from export.bundle.manifest import ONNX_FP8, Manifest
from export.runtime.plans import Fastest, find_plan, plans_in
from model.demo import STORE
from tests.service.conftest import Serve
from tests.service.registry.test_models import serving, wait_until

WRITTEN = Path(__file__).parent / "upgrade"


def test_a_service_reads_the_jobs_keys_and_store_of_the_version_before(
    serve: Serve, video: Path, tmp_path: Path
) -> None:
    jobs, store = tmp_path / "jobs", tmp_path / "store"
    for folder in ("videos", "results"):
        (jobs / folder).mkdir(parents=True)
    with sqlite3.connect(jobs / "jobs.sqlite") as database:
        database.executescript((WRITTEN / "jobs.sql").read_text())
    database.close()
    (jobs / "results" / "job_done").write_text('{"start":null}')
    shutil.copy(video, jobs / "videos" / "job_waits")
    for version in "12":
        shutil.copytree(STORE / "demo" / "1", store / "demo" / version)
    for pointer in ("active.json", "candidate.json"):
        shutil.copy(WRITTEN / pointer, store / "demo")
    files = {"jobs_dir": jobs, "store": store, "api_keys_file": WRITTEN / "keys.json"}
    with serve(**files, spool_dir=tmp_path) as client:
        assert serving(client) == "1"
        assert client.get("/v1/jobs").status_code == 401
        client.headers["Authorization"] = "Bearer tsf_of_the_version_before"
        wait_until(lambda: client.get("/v1/jobs/job_waits").json()["state"] == "done")
        assert client.get("/v1/jobs/job_waits/result").json()["embedding"]
        assert client.get("/v1/jobs/job_done/result").json() == {"start": None}
        failed = client.get("/v1/jobs/job_failed").json()
        assert (failed["state"], failed["error"]["code"]) == ("failed", "undecodable_video")
        repeated = client.post(
            "/v1/jobs?kind=embed", content=b"video", headers={"Idempotency-Key": "k"}
        )
        assert repeated.json()["id"] == "job_done"
    opened = BundleStore(store)
    assert opened.history("demo") == ["1", "2"]
    candidate = opened.candidate("demo")
    assert candidate is not None
    assert (candidate.version, candidate.mode, candidate.share) == ("2", "canary", 0.25)


def test_manifests_and_plans_of_the_version_before_are_read(tmp_path: Path) -> None:
    text = (WRITTEN / "manifest.json").read_text()
    manifest = Manifest.model_validate_json(text)
    assert json.loads(manifest.model_dump_json()) == json.loads(text)
    assert manifest.config.num_frames == 8
    assert manifest.products[ONNX_FP8][0].precision == "fp8"
    (tmp_path / "a.plan").write_bytes(b"a plan")
    shutil.copy(WRITTEN / "plan.json", tmp_path / "a.json")
    (plan,) = plans_in(tmp_path)
    assert find_plan(tmp_path, plan.facts.key, "0" * 64) == plan
    fastest = Fastest.model_validate_json((WRITTEN / "fastest.json").read_bytes())
    assert fastest.order == ("fp16",)
