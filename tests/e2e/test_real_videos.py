"""Every real file, posted to the running service: the sandbox of the decoders hides no codec.

What is true of each file is tested in tests/model/video/test_real_videos.py.
"""

from __future__ import annotations

import re
from typing import Any

from tests.model.video.test_real_videos import BROKEN, SOUND, VIDEOS, pytestmark

__all__ = ["pytestmark"]


def test_each_real_file_gets_the_outcome_of_the_library(service: Any) -> None:
    for name in (*SOUND, *BROKEN):
        with (VIDEOS / name).open("rb") as file:
            response = service.client.post("/v1/classify", files={"file": file})
        answer = response.json()
        if name in BROKEN:
            assert (response.status_code, answer["code"]) == (422, BROKEN[name].code), name
            continue
        assert response.status_code == 200, (name, answer)
        _, width, height, _, duration, truncated = SOUND[name]
        video, sampling = answer["video"], answer["sampling"]
        assert (video["width"], video["height"]) == (width, height), name
        assert video["truncated"] is truncated, name
        assert len(answer["predictions"]) == 5
        assert 0 < sum(prediction["score"] for prediction in answer["predictions"]) <= 1.0001
        (times,) = sampling["times_s"]
        assert times == sorted(times), name
        assert 0 <= times[0] <= times[-1] <= video["duration_s"], name
        assert sampling["mode"] == ("uniform" if duration < 0.9 else "dense"), name
    metrics = service.client.get("/metrics").text
    restarts = re.findall(r"^timesformer_decoder_restarts_total\{.*\} (.+)$", metrics, re.MULTILINE)
    assert restarts
    assert {float(count) for count in restarts} == {0.0}, "no file has cost a decoder"
