"""`POST /v1/embed` as clients use it: over a socket, with real bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle.bundle import BundleStore
from export.runtime import load_runtime
from model.demo import STORE
from model.video import load_clips
from service.inference.postprocess import mean_embedding

URL = "/v1/embed"
# What `classify` answers too; how uploads, limits and faults behave is tested there.
SHARED_FACTS = ("model", "sampling", "video")


@pytest.mark.parametrize(("views", "crops"), [(1, 1), (2, 3)])
def test_the_embedding_is_the_mean_of_the_networks_over_the_clips(
    client: httpx.Client, video: Path, views: int, crops: Any
) -> None:
    parameters = {"views": views, "crops": crops}
    answer = client.post(URL, params=parameters, content=video.read_bytes()).json()
    bundle = BundleStore(STORE).open("demo")
    clips = load_clips(video, bundle.config.preprocessing, views=views, crops=crops)
    expected = load_runtime(bundle, "cpu").run(clips.frames).embedding.mean(axis=0)
    assert answer["dim"] == len(answer["embedding"]) == bundle.config.embed_dim
    np.testing.assert_allclose(answer["embedding"], expected, atol=1e-4)


def test_it_says_of_the_video_what_classify_says(client: httpx.Client, video: Path) -> None:
    content = video.read_bytes()
    embedded = client.post(URL, params={"views": 3}, content=content)
    classified = client.post("/v1/classify", params={"views": 3}, content=content).json()
    answer = embedded.json()
    assert {key: answer[key] for key in SHARED_FACTS} == {
        key: classified[key] for key in SHARED_FACTS
    }
    assert answer["timings_ms"].keys() == classified["timings_ms"].keys()
    assert 0 < answer["timings_ms"]["inference"] < answer["timings_ms"]["total"]
    assert answer["request_id"] == embedded.headers["x-request-id"]


def test_its_numbers_are_float32_in_their_shortest_form() -> None:
    vector = mean_embedding(np.array([[0.1, 1e-8, -3.0], [0.3, 3e-8, -3.0]], np.float32))
    assert vector == [0.2, 2e-8, -3.0]


def test_its_description_has_its_body_parameters_and_problems(client: httpx.Client) -> None:
    description = client.get("/openapi.json").json()
    embed = description["paths"]["/v1/embed"]["post"]
    names = [parameter["name"] for parameter in embed["parameters"]]
    assert names == ["model", "views", "crops", "X-Request-Priority", "X-Request-Timeout"]
    form = embed["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"file", "source_url", "model", "views", "crops"}
    assert {"400", "408", "413", "415", "422", "503", "504"} <= set(embed["responses"])
    assert description["components"]["schemas"]["EmbedResponse"]["examples"]
