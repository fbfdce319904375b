"""Responses of `/v1/classify` and `/v1/embed`, and how a timeline is sent."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, JsonValue

from service.inference.parameters import JobTimelineParameters, Schema
from service.inference.results import Classification, Embedding


class Timings(Schema):
    """Milliseconds spent on this request."""

    upload: float
    decode: float = Field(description="Including the wait for a free decoder.")
    queue: float = Field(description="The wait for the engine.")
    inference: float
    total: float


_EXAMPLE_FACTS: dict[str, JsonValue] = {
    "model": {"name": "demo", "version": "1"},
    "sampling": {
        "mode": "dense",
        "views": 1,
        "crops": 1,
        "times_s": [[0.53, 0.67, 0.8, 0.93, 1.07, 1.2, 1.33, 1.47]],
    },
    "video": {
        "width": 320,
        "height": 240,
        "rotation": 0,
        "duration_s": 2.0,
        "frames": 60,
        "frame_rate": 30.0,
        "codec": "h264",
        "container": "mp4",
        "truncated": False,
    },
    "timings_ms": {
        "upload": 0.8,
        "decode": 21.5,
        "queue": 0.3,
        "inference": 14.2,
        "total": 37.4,
    },
    "request_id": "8c1f6a7e5d0b4f0f9a52a3f2c1d0e9b8",
}


class ClassifyResponse(Classification):
    timings_ms: Timings
    request_id: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "predictions": [
                        {"label": "turning clockwise", "class_index": 6, "score": 0.97}
                    ],
                    **_EXAMPLE_FACTS,
                }
            ]
        }
    )


class EmbedResponse(Embedding):
    timings_ms: Timings
    request_id: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "embedding": [0.8125, -1.25, 0.0625, 0.5],
                    "dim": 4,
                    **_EXAMPLE_FACTS,
                }
            ]
        }
    )


class TimelineRequest(JobTimelineParameters):
    """The same, and how it is to be sent."""

    format: Literal["ndjson", "sse"] | None = Field(
        None,
        description="`ndjson`: a JSON object a line. `sse`: server-sent events. By default what "
        "`Accept` asks for, else `ndjson`.",
    )
