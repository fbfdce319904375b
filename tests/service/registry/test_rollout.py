"""A candidate version beside the serving one: as a shadow nobody notices it, as a canary it answers
its share, and one that breaks is taken out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle.bundle import BundleError, BundleStore, Candidate
from export.bundle.pointers import CANDIDATE
from model.scores import mean_scores
from tests.export.conftest import colour_manifest, publish_colours, write_video
from tests.service.api.test_auth import bearer, write
from tests.service.conftest import Serve, tensor
from tests.service.registry.test_models import metric, wait_until
from tests.service.registry.test_several_models import spoil

URL = "/v1/classify"
ADMIN = "/v1/admin/models/colours"
# Times black it is nothing, times red it is more than float32 can say: it passes every warm-up.
BREAKS_ON_LIGHT = 1e-38


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("videos") / "red.mp4", "red").read_bytes()


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Version 1 serves; 2 answers the same a little less surely, 3 names another colour, 4 breaks
    on what is not black.
    """
    store = BundleStore(tmp_path / "store")
    for divisor in (64, 80, -64, BREAKS_ON_LIGHT):
        publish_colours(store, divisor=divisor)
    store.activate("colours", "1")
    return store


class Admin:
    """A service, and an administrator's way to it."""

    def __init__(self, client: httpx.Client, headers: dict[str, str]) -> None:
        self.client = client
        self._headers = headers

    def send(self, method: str, path: str = "", **arguments: Any) -> httpx.Response:
        return self.client.request(method, ADMIN + path, headers=self._headers, **arguments)

    def attempt(self, version: str, mode: str, share: float) -> httpx.Response:
        wanted = {"version": version, "mode": mode, "share": share}
        return self.send("PUT", "/candidate", json=wanted)

    def candidate(self) -> Any:
        return self.send("GET").json()["candidate"]

    def version(self, red: bytes, **headers: str) -> str:
        answer = self.client.post(URL, content=red, headers={**self._headers, **headers})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        # What it says is what that version says.
        expected = {"1": "red", "2": "red", "5": "red"}.get(body["model"]["version"])
        assert (body["predictions"][0]["label"] == "red") == (expected == "red")
        return str(body["model"]["version"])

    def count(self, result: str) -> float:
        name = "timesformer_candidate_requests_total"
        return metric(self.client, f'{name}{{model="colours",result="{result}"}}')


@pytest.fixture
def run(serve: Serve, store: BundleStore, tmp_path: Path) -> Any:
    @contextmanager
    def running(**settings: Any) -> Iterator[Admin]:
        headers = bearer(write(tmp_path / "keys.json")["admin"])
        given = {"watch_interval_s": 0, "api_keys_file": tmp_path / "keys.json", **settings}
        with serve(store=store.root, **given) as client:
            yield Admin(client, headers)

    return running


def test_a_shadow_is_compared_and_answers_nobody(run: Any, store: BundleStore, red: bytes) -> None:
    with run() as admin:
        answer = admin.attempt("2", "shadow", 1)
        assert answer.status_code == 200, answer.text
        assert store.candidate("colours").version == "2"
        assert {admin.version(red) for _ in range(5)} == {"1"}
        wait_until(lambda: admin.count("agreed") == 5)
        facts = admin.candidate()
        assert facts["trying"] is True
        assert facts["requests"]["agreed"] == 5
        # Its softmax of the same means is flatter.
        means = np.array([220, 0, 0])
        expected = abs(mean_scores(means[None], 64) - mean_scores(means[None], 80)).sum() / 2
        assert facts["mean_score_difference"] == pytest.approx(expected, rel=0.1)
        assert metric(admin.client, 'timesformer_candidate_seconds_count{model="colours"}') == 5
        share = 'timesformer_candidate_share{mode="shadow",model="colours",version="2"}'
        assert metric(admin.client, share) == 1
        admin.attempt("3", "shadow", 1)
        admin.version(red)
        wait_until(lambda: admin.count("differed") == 1)
        assert metric(admin.client, share) == 0


def test_a_canary_answers_its_share_and_says_so(run: Any, red: bytes) -> None:
    with run() as admin:
        admin.attempt("3", "canary", 0.5)
        versions = Counter(admin.version(red) for _ in range(40))
        assert versions.keys() == {"1", "3"}
        assert admin.count("answered") == versions["3"]
        admin.attempt("3", "canary", 1)
        assert {admin.version(red) for _ in range(5)} == {"3"}
        assert admin.send("DELETE", "/candidate").json()["candidate"] is None
        assert {admin.version(red) for _ in range(5)} == {"1"}


def test_the_same_key_gets_the_same_version_and_a_larger_share_takes_no_key_away(
    run: Any, red: bytes
) -> None:
    keys = [f"user-{number}" for number in range(12)]

    def canaries(admin: Admin) -> set[str]:
        return {key for key in keys if admin.version(red, **{"X-Canary-Key": key}) == "3"}

    with run() as admin:
        admin.attempt("3", "canary", 0.4)
        few = canaries(admin)
        assert 0 < len(few) < len(keys)
        assert canaries(admin) == few
        admin.attempt("3", "canary", 0.8)
        assert canaries(admin) > few


def test_clips_that_come_ready_go_to_a_canary_too_and_either_version_can_be_asked_for(
    run: Any, red: bytes
) -> None:
    frames = np.full((1, 4, 16, 16, 3), 64, np.uint8)
    request = tensor(frames)

    with run() as admin:
        admin.attempt("2", "canary", 1)

        def infer(path: str = "") -> tuple[str, float]:
            headers = admin._headers | request["headers"]
            answer = admin.client.post(
                f"/v2/models/colours{path}/infer", content=request["content"], headers=headers
            ).json()
            return answer["model_version"], answer["outputs"][0]["data"][0]

        assert infer() == ("2", pytest.approx(0.8))
        assert infer("/versions/1") == ("1", pytest.approx(1.0))
        assert infer("/versions/2") == ("2", pytest.approx(0.8))


def test_promoting_makes_the_candidate_active_without_loading_it_again(
    run: Any, store: BundleStore, red: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with run() as admin:
        assert admin.send("POST", "/candidate/promote").json()["code"] == "bundle_refused"
        admin.attempt("3", "canary", 0.5)
        loads = caplog.text.count("model loaded")
        promoted = admin.send("POST", "/candidate/promote")
        assert promoted.json() == {"name": "colours", "version": "3"}
        assert caplog.text.count("model loaded") == loads
        assert store.active("colours") == "3"
        assert store.candidate("colours") is None
        assert admin.candidate() is None
        assert {admin.version(red) for _ in range(5)} == {"3"}
        assert metric(admin.client, 'timesformer_swaps_total{model="colours",result="done"}') == 1


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_one_whose_engine_fails_is_taken_out_and_every_request_is_answered(
    run: Any, red: bytes, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with run() as admin:
        assert admin.attempt("4", mode, 1).status_code == 200
        assert {admin.version(red) for _ in range(3)} == {"1"}
        wait_until(lambda: admin.count("failed") == 1)
        assert {admin.version(red) for _ in range(3)} == {"1"}
        assert admin.count("failed") == 1
        facts = admin.candidate()
        assert facts["trying"] is False
        assert facts["refused"]
        assert metric(admin.client, 'timesformer_candidate_refused{model="colours"}') == 1
        assert caplog.text.count("candidate not tried") == 1
        assert admin.attempt("2", mode, 1).json()["candidate"]["trying"] is True
        assert metric(admin.client, 'timesformer_candidate_refused{model="colours"}') == 0


def test_one_that_cannot_be_used_is_refused_and_nothing_changes(
    run: Any, store: BundleStore, red: bytes
) -> None:
    spoil(store, "colours", "2")
    with run() as admin:
        admin.attempt("3", "canary", 1)
        for version in ("1", "9", "2"):
            refused = admin.attempt(version, "canary", 1)
            assert (refused.status_code, refused.json()["code"]) == (409, "bundle_refused")
        assert store.candidate("colours").version == "3"
        assert admin.version(red) == "3"


def test_a_share_is_more_than_nothing_and_at_most_all(run: Any) -> None:
    with run() as admin:
        for share in (0, 1.1, -1, "many"):
            assert admin.attempt("2", "canary", share).status_code == 422


def test_a_version_that_looks_at_videos_in_another_way_is_a_canary_but_no_shadow(
    run: Any, store: BundleStore, red: bytes
) -> None:
    preprocessing = {**colour_manifest().preprocessing, "frame_stride": 1}
    publish_colours(store, preprocessing=preprocessing)
    with run() as admin:
        refused = admin.attempt("5", "shadow", 1)
        assert refused.status_code == 409
        assert "no shadow" in refused.json()["detail"]
        assert admin.attempt("5", "canary", 1).status_code == 200
        assert admin.version(red) == "5"


def test_the_watch_follows_what_the_store_says(run: Any, store: BundleStore, red: bytes) -> None:
    store.try_candidate("colours", Candidate(version="3", mode="canary", share=1))
    with run(watch_interval_s=0.05) as admin:
        assert admin.version(red) == "3", "a restart goes on with the candidate"
        spoil(store, "colours", "2")
        (store.root / "colours" / CANDIDATE).write_text(
            json.dumps({"version": "2", "mode": "canary", "share": 1, "since": "2026-01-01"})
        )
        # Half a file, which the watch may meet, is refused too and ends no trial.
        wait_until(lambda: admin.version(red) == "1")
        assert metric(admin.client, REFUSED) == 1
        store.try_candidate("colours", None)
        wait_until(lambda: metric(admin.client, REFUSED) == 0)
        (store.root / "colours" / CANDIDATE).write_text("{")
        wait_until(lambda: metric(admin.client, REFUSED) == 1)
        assert admin.version(red) == "1"
        store.try_candidate("colours", Candidate(version="3", mode="canary", share=1))
        wait_until(lambda: admin.version(red) == "3")
        store.activate("colours", "3")
        wait_until(lambda: admin.client.get("/health/ready").json()["model"]["version"] == "3")
        assert metric(admin.client, REFUSED) == 0


REFUSED = 'timesformer_candidate_refused{model="colours"}'


def test_a_store_takes_no_candidate_that_serves_or_is_damaged(store: BundleStore) -> None:
    with pytest.raises(BundleError, match="is the active one"):
        store.try_candidate("colours", Candidate(version="1", mode="canary", share=1))
    spoil(store, "colours", "2")
    with pytest.raises(BundleError, match="its hash is off"):
        store.try_candidate("colours", Candidate(version="2", mode="canary", share=1))
    assert store.candidate("colours") is None
