"""Parameters of requests: how a video is sampled and which part of the answer is wanted.

The same parameters serve HTTP, jobs, the command line and archives.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def number(value: object) -> object:
    """Of a string of digits, as query and form values are; a Literal of numbers takes no other."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class ViewParameters(Schema):
    """How a video is to be looked at, and by which model."""

    model: str | None = Field(
        None, max_length=64, description="Name of the model, if several serve; see `/v1/models`."
    )
    views: int = Field(1, ge=1, le=1000, description="Clips spread over the video's length.")
    crops: Annotated[Literal[1, 3], BeforeValidator(number)] = Field(
        1, description="1: the centre. 3: the two ends and the centre of the long side."
    )


class ClassifyParameters(ViewParameters):
    """How a video is to be looked at, and how much of the answer is wanted."""

    top_k: int = Field(5, ge=1, le=10_000, description="Labels in the answer, best first.")
    threshold: float = Field(0.0, ge=0, le=1, description="Labels that score less are left out.")


class TimelineParameters(Schema):
    """How a long video is to be cut into windows, and what is wanted of them."""

    window: float | None = Field(
        None,
        gt=0,
        le=3600,
        description="Seconds that one window shows; by default the span of the model's own clips.",
    )
    stride: float | None = Field(
        None,
        gt=0,
        le=3600,
        description="Seconds from the start of one window to that of the next, from an eighth of a "
        "window to a whole one; by default half a window.",
    )
    crops: Annotated[Literal[1, 3], BeforeValidator(number)] = Field(
        1, description="1: the centre. 3: the two ends and the centre of the long side."
    )
    top_k: int = Field(3, ge=1, le=10_000, description="Labels of each window, best first.")
    threshold: float = Field(0.0, ge=0, le=1, description="Labels that score less are left out.")
    smoothing: int = Field(
        3,
        ge=1,
        le=99,
        description="Windows that a score is averaged over, itself in their middle, before "
        "segments are made; an odd number.",
    )
    open_score: float = Field(
        0.5, ge=0, le=1, description="Smoothed score that a segment must reach somewhere."
    )
    close_score: float = Field(
        0.3, ge=0, le=1, description="Smoothed score that it must keep; at most `open_score`."
    )
    min_segment: float = Field(
        0.0, ge=0, le=86_400, description="Shorter segments, in seconds, are dropped."
    )

    @model_validator(mode="after")
    def _rule_is_one(self) -> Self:
        if self.close_score > self.open_score:
            raise ValueError("close_score must not be above open_score")
        if self.smoothing % 2 == 0:
            raise ValueError("smoothing must be an odd number")
        return self


class JobTimelineParameters(TimelineParameters):
    """The same, and by which model."""

    model: str | None = Field(
        None, max_length=64, description="Name of the model, if several serve; see `/v1/models`."
    )
