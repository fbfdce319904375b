"""Every setting of the service, once. Environment variables, CLI flags and docs come from here.

`Settings()` reads `TIMESFORMER_<NAME>`; `timesformer serve` has a flag `--<name>` for each field,
which wins over the environment.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from export.runtime.cores import usable_cores
from export.runtime.interface import Device, Precision

ENV_PREFIX = "TIMESFORMER_"
MIB = 1024 * 1024
ALL_MODELS = "*"
ALL_GPUS = "all"
# What Kubernetes sets in every pod for every Service, here for those named `timesformer...`.
_SERVICE_LINK = re.compile(
    ENV_PREFIX + r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_.+)?)"
)
HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,252}[a-z0-9])?|\[[0-9a-f:.]+\]")
_HOST_ENTRY = re.compile(rf"(\*\.)?({HOST.pattern})(:[0-9]{{1,5}})?")
_ORIGIN = re.compile(r"\*|https?://[^/\s?#@]+")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+")
REMOVED: dict[str, str] = {
    "workers": "run one service per GPU, and replicas behind a load balancer: docs/capacity.md",
    "batch_settle_ms": "a batch waits at most 2 ms",
    "max_decode_queue": "at most 64 videos wait for a decoder: set TIMESFORMER_DECODE_WORKERS",
    "max_windows": "a video gives at most 20,000 windows: clients ask for a longer stride",
    "timeline_workers": "a quarter of TIMESFORMER_DECODE_WORKERS is used, at least two",
    "timeline_timeout_s": "a timeline may take as long as the longest video, and at least an hour: "
    "set TIMESFORMER_MAX_LONG_VIDEO_DURATION_S",
    "max_waiting_jobs": "at most 1,000 jobs wait: add replicas, each with its own folder of jobs",
    "max_job_result_bytes": "a result has at most 256 MiB: clients ask for fewer labels",
    "engine_threads": "the engine uses each core that the process may use: limit the cores",
}
"""Settings of earlier versions, and what an operator does instead."""


class SettingsError(ValueError):
    """A setting that is unknown or has a value that cannot be used; the message names its
    environment variable."""


class Settings(BaseSettings):
    """Validated once, at start."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        allow_inf_nan=False,
        frozen=True,
        extra="forbid",
    )

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Set 0.0.0.0 in a container or behind a proxy.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port for `/v1/admin` and `/metrics`, which are then not on the other one; 0 "
        "takes a free one. Without it they are on the same port. Administration needs a key with "
        "the scope `admin` on either.",
    )
    store: Path | None = Field(
        None,
        description="Folder of bundles, as `timesformer export --store` writes it. Without it the "
        "bundled demo model is served.",
    )
    store_url: str | None = Field(
        None,
        description="Store of bundles at a URL (`s3://bucket/bundles`, `gs://`), as `timesformer "
        "bundles push` fills it. `store` is then the folder of this node that it is fetched into; "
        "replicas may share it. Asked every `watch_interval_s`.",
    )
    model: str | None = Field(
        None,
        description="Name of the bundle to serve; its active version is taken. Several with "
        "commas, or `*` for all of the store: requests then choose with `model`, and the first is "
        "the default. Each costs its memory. Needed only when the store has more than one name.",
    )
    watch_interval_s: float = Field(
        2.0,
        ge=0,
        description="How often the store is asked whether another version was activated, which "
        "then takes over without losing a request. 0: never.",
    )
    device: Device = Field(
        "auto",
        description="`cuda` refuses to start without a usable GPU; `auto` warns and takes the "
        "CPU. The readiness endpoint and the metrics name the one in use.",
    )
    precision: Precision = Field(
        "float32",
        description="In what the network computes. `float32` gives its answers to the last digit; "
        "the others are faster, near, and take a bundle that was exported to them. `int8` is for "
        "CPUs and for TensorRT, `fp16` for GPUs, `fp8` for TensorRT alone (FP8 on Ada, Hopper and "
        "later). `auto` takes the fastest that the bundle has and the device can do: on a CPU by "
        "the export's measurement, on a GPU by that of `timesformer engines choose`, else FP8, "
        "INT8, FP16, float32 in this order. ONNX Runtime on a GPU serves FP16 unless this is "
        "`float32`.",
    )
    tensorrt: Literal["auto", "prebuilt", "off"] = Field(
        "auto",
        description="`auto` serves with TensorRT where there is a GPU and TensorRT is installed; a "
        "plan that is missing or does not fit is built in the background, for minutes, while ONNX "
        "Runtime serves. `timesformer engines build` builds plans before the start. With "
        "`prebuilt` the service builds no plan. `off` never uses TensorRT.",
    )
    gpu: str = Field(
        "0",
        description="Which of the visible GPUs are used: a number, several with commas (`0,1`), or "
        "`all`. Each has an engine of every model, and all of a model's engines are behind one "
        "queue.",
    )
    engines: Path | None = Field(
        None,
        description="Folder of TensorRT plans; by default each bundle's own `engines`, which must "
        "then be writable.",
    )
    refittable_plans: bool = Field(
        False,
        description="Whether TensorRT plans are built so that the weights of a later version of "
        "the same network can be put into them, in seconds and not minutes. Whether such plans are "
        "slower was not measured: compare them by `timesformer bench` first.",
    )
    max_batch_clips: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Most clips that go through the network together; by default 16 on a GPU and "
        "2 on a CPU. Larger batches serve more on a GPU and cost memory. On a CPU they save our "
        "own share of the work but run slower clip by clip, as less of them fits into the caches.",
    )
    max_queue_clips: int = Field(
        256,
        ge=1,
        description="Most clips that wait for the engine; past that requests get 503 with "
        "Retry-After. Roughly the clips that the engine does in the time a client will wait.",
    )
    max_upload_bytes: int = Field(
        200 * MIB, ge=1, description="Largest request body; past that the answer is 413."
    )
    head_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Longest time that a client may take to send a request's line and headers; "
        "then 408 and the connection is closed.",
    )
    upload_timeout_s: float = Field(
        60.0, gt=0, description="Longest time that a client may take to send its body."
    )
    min_upload_rate: float = Field(
        10_000.0,
        ge=0,
        description="Bytes a second that a body has to come at, as a mean over 15 s, and over a "
        "minute for a long video's; then 408. 0: any.",
    )
    max_tensor_bytes: int = Field(
        512 * MIB,
        ge=MIB,
        description="Most bytes of requests with clips that were sent ready (`/v2`) in memory at "
        "once, each from its arrival to its answer, decompressed; past that the answer is 503 with "
        "Retry-After, and 413 for one that is larger than all of it.",
    )
    max_clips_per_request: int = Field(
        30,
        ge=1,
        le=1000,
        description="Most clips that one request may ask for (views x crops) or bring.",
    )
    decode_workers: int = Field(
        default_factory=lambda: max(2, usable_cores()),
        ge=1,
        le=256,
        description="Processes that decode videos. One per CPU core that is not busy with "
        "inference.",
    )
    decode_timeout_s: float = Field(
        30.0,
        gt=0,
        description="Longest time that one video may take to decode; its worker is then replaced.",
    )
    decode_memory_bytes: int = Field(
        2048 * MIB,
        ge=512 * MIB,
        description="Address space of one decoder process. A video that needs more is refused.",
    )
    decode_sandbox: Literal["auto", "required", "off"] = Field(
        "auto",
        description="Decoders may read the spool and their libraries and do nothing else, held in "
        "by the kernel: Landlock for files, seccomp for system calls. `auto` takes what the "
        "kernel has and warns of the rest, `required` refuses to start without both.",
    )
    max_video_duration_s: float = Field(3600.0, gt=0, description="Longest video that is accepted.")
    max_video_pixels: int = Field(
        8192 * 4320, ge=1, description="Most pixels per frame; larger videos are refused unread."
    )
    request_timeout_s: float = Field(
        120.0, gt=0, description="Longest time from a complete upload to its answer; then 504."
    )
    shutdown_delay_s: float = Field(
        0.0,
        ge=0,
        description="After SIGTERM, how long the service goes on taking requests while it says "
        "that it is not ready, so that load balancers notice before it refuses.",
    )
    shutdown_grace_s: float = Field(
        30.0,
        ge=0,
        description="After that, how long requests in progress may take to finish. What is not "
        "done then, a stalled upload too, is answered 503, or cut off where an answer has begun.",
    )
    source_hosts: str = Field(
        "",
        description="Hosts that videos may be read from by `source_url`, with commas between: "
        "`videos.example.org`, `*.s3.amazonaws.com`, `name:port` for another port than 443. Empty: "
        "no URL is read.",
    )
    source_http: bool = Field(
        False, description="Whether these hosts may also be read from without TLS."
    )
    source_private: bool = Field(
        False,
        description="Whether these hosts may have addresses that are not of the public internet. "
        "Only where every one of them is your own.",
    )
    max_long_upload_bytes: int = Field(
        2048 * MIB,
        ge=1,
        description="Largest body for `/v1/timeline` and `/v1/jobs`, which take long videos.",
    )
    long_upload_timeout_s: float = Field(
        600.0, gt=0, description="Longest time that a client may take to send a long video."
    )
    max_long_video_duration_s: float = Field(
        4 * 3600.0, gt=0, description="Longest video for `/v1/timeline` and `/v1/jobs`."
    )
    jobs_dir: Path | None = Field(
        None,
        description="Folder of `/v1/jobs`: their videos, states and results, on a disk that lasts. "
        "Without it there are no jobs. One server at a time uses a folder.",
    )
    job_workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Jobs that run at once, each with a decoder process of its own that stands "
        "back for others.",
    )
    max_jobs_bytes: int = Field(
        20 * 1024 * MIB,
        ge=1,
        description="Most bytes of the videos of jobs that are not done and of the results of "
        "those that are; past that the answer is 503.",
    )
    job_retention_s: float = Field(
        7 * 24 * 3600.0, gt=0, description="How long a job is kept, with its result, once it ended."
    )
    webhook_hosts: str = Field(
        "",
        description="Hosts that jobs may call when they have ended, as in `source_hosts`. Empty: "
        "none.",
    )
    webhook_http: bool = Field(False, description="Whether they may be called without TLS.")
    webhook_private: bool = Field(
        False,
        description="Whether they may have addresses that are not of the public internet.",
    )
    webhook_secret_file: Path | None = Field(
        None,
        description="File with the secret that signs calls: `whsec_` and the base64 of 24 to 64 "
        "bytes, or at least 16 bytes that are used as they are.",
    )
    spool_dir: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()),
        description="Where uploads lie while they are decoded. A fast local disk or a tmpfs.",
    )
    max_spool_bytes: int | None = Field(
        None,
        ge=1,
        description="Most bytes of uploads in the spool at once; past that the answer is 503 with "
        "Retry-After. By default what the disk holds.",
    )
    api_keys_file: Path | None = Field(
        None,
        description="File of API keys, as `timesformer keys` writes it. With it, requests need a "
        "key; without it, anyone who reaches the port may infer, and nobody may administrate.",
    )
    pages: Literal["on", "off"] = Field(
        "on",
        description="Whether `/`, `/docs` and `/openapi.json` are there: pages to try the service "
        "with and its description.",
    )
    cors_origins: str | None = Field(
        None,
        description="Origins whose pages may call the service from a browser, with commas between "
        "(`https://app.example.com`), or `*` for all. Without it no page of elsewhere may.",
    )
    tracing: Literal["off", "otlp"] = Field(
        "off",
        description="`otlp` sends a span for each request, with its stages, to the OpenTelemetry "
        "collector that OTEL_EXPORTER_OTLP_ENDPOINT names; needs the extra `otel`. Trace ids of "
        "clients stand in the log in either case.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log records that are written."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="`json`, one object a line, for machines; `text` for people."
    )

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names in `model`; none if it names none or all."""
        if self.model is None or self.model == ALL_MODELS:
            return ()
        return tuple(dict.fromkeys(name.strip() for name in self.model.split(",")))

    @field_validator("model")
    @classmethod
    def _models_are_named(cls, model: str | None) -> str | None:
        if model is not None and not all(name.strip() for name in model.split(",")):
            raise ValueError("a name between the commas is missing")
        return model

    @property
    def gpus(self) -> tuple[int, ...] | None:
        """The GPUs that are named; None for all."""
        return None if self.gpu == ALL_GPUS else tuple(map(int, self.gpu.split(",")))

    @field_validator("gpu", mode="before")
    @classmethod
    def _gpus_are_numbered(cls, value: object) -> str:
        gpus = [gpu.strip() for gpu in str(value).split(",")]
        if gpus != [ALL_GPUS] and not all(re.fullmatch("[0-9]{1,4}", gpu) for gpu in gpus):
            raise ValueError(f"give numbers with commas between, such as 0,1, or {ALL_GPUS}")
        if len({gpu.lstrip("0") for gpu in gpus}) < len(gpus):
            raise ValueError("a GPU is named twice")
        return ",".join(gpus)

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str | None) -> str | None:
        for origin in (value or "*").split(","):
            if not _ORIGIN.fullmatch(origin.strip()):
                raise ValueError(f"{origin.strip()!r} is no origin, such as https://example.com")
        return value

    @model_validator(mode="after")
    def _a_remote_store_has_a_folder(self) -> Settings:
        if self.store_url is not None and self.store is None:
            raise ValueError(
                "TIMESFORMER_STORE_URL: it needs TIMESFORMER_STORE, the folder that bundles are "
                "fetched into"
            )
        return self

    @field_validator("source_hosts", "webhook_hosts")
    @classmethod
    def _lists_hosts(cls, value: str) -> str:
        parse_hosts(value)
        return value

    @property
    def timeline_workers(self) -> int:
        """How many videos are decoded for `/v1/timeline` at once, each by a process of its own."""
        return max(2, self.decode_workers // 4)

    @property
    def timeline_timeout_s(self) -> float:
        """Longest time from a complete upload to the end of its timeline, or of a job."""
        return max(3600.0, self.max_long_video_duration_s)

    @property
    def hosts_of_sources(self) -> tuple[str, ...]:
        return parse_hosts(self.source_hosts)

    @property
    def hosts_of_webhooks(self) -> tuple[str, ...]:
        return parse_hosts(self.webhook_hosts)

    @model_validator(mode="after")
    def _largest_request_fits(self) -> Settings:
        most = self.max_queue_clips
        if most < self.max_clips_per_request:
            raise ValueError(
                f"TIMESFORMER_MAX_QUEUE_CLIPS: {most} is below TIMESFORMER_MAX_CLIPS_PER_REQUEST "
                f"({self.max_clips_per_request}): the largest request could never be queued"
            )
        spool, jobs = self.max_spool_bytes, self.max_jobs_bytes
        for limit in ("max_upload_bytes", "max_long_upload_bytes"):
            if spool is not None and spool < getattr(self, limit):
                raise ValueError(
                    f"TIMESFORMER_MAX_SPOOL_BYTES: {spool} is below "
                    f"{ENV_PREFIX}{limit.upper()} ({getattr(self, limit)}): the largest upload "
                    "would never fit"
                )
        if self.jobs_dir is not None and jobs < self.max_long_upload_bytes:
            raise ValueError(
                f"TIMESFORMER_MAX_JOBS_BYTES: {jobs} is below TIMESFORMER_MAX_LONG_UPLOAD_BYTES "
                f"({self.max_long_upload_bytes}): the largest video would never fit"
            )
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Settings:
        if self.admin_port == self.port != 0:
            raise ValueError(
                f"TIMESFORMER_ADMIN_PORT: it is {self.port} as TIMESFORMER_PORT is: give it "
                "another, or none"
            )
        return self


def parse_hosts(text: str) -> tuple[str, ...]:
    """Returns the entries of a list of hosts with commas between.

    Raises:
        ValueError: an entry is no host.
    """
    entries = tuple(entry.strip().lower() for entry in text.split(",") if entry.strip())
    for entry in entries:
        if not _HOST_ENTRY.fullmatch(entry):
            raise ValueError(f"{entry!r} is no host; write name, *.suffix or name:port")
    return entries


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment, with those given here on top; None is none.

    Raises:
        SettingsError: names each variable that is unknown or wrong, and why.
    """
    problems = [_unknown(name) for name in _unknown_names(os.environ)]
    try:
        settings = Settings(**{key: value for key, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise SettingsError("\n".join(problems + _problems(error))) from error
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def _unknown_names(environment: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that set nothing: most likely a typo."""
    known = _variables()
    return [
        name
        for name, value in environment.items()
        if (upper := name.upper()).startswith(ENV_PREFIX)
        and upper not in known
        and not _SERVICE_LINK.fullmatch(upper)
        and not _SERVICE_ADDRESS.fullmatch(value)
    ]


def removal(name: str) -> str:
    """Says that the setting, a variable or a flag, was removed, and what to do instead."""
    field = name.lower().removeprefix(ENV_PREFIX.lower()).removeprefix("--").replace("-", "_")
    return f"{name}: this setting was removed; {REMOVED[field]}"


def _unknown(name: str) -> str:
    if name.lower().removeprefix(ENV_PREFIX.lower()) in REMOVED:
        return removal(name)
    nearest = difflib.get_close_matches(name.upper(), _variables(), n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(_variables())}"
    return f"{name}: there is no such setting; {hint}"


def _variables() -> list[str]:
    return [f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields]


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        if not problem["loc"]:
            # Of several settings, which the message names; the input would be all of them.
            lines.append(problem["msg"].removeprefix("Value error, "))
            continue
        name = ENV_PREFIX + "_".join(map(str, problem["loc"])).upper()
        lines.append(f"{name}: {problem['msg']} (got {problem['input']!r})")
        if _SERVICE_ADDRESS.fullmatch(str(problem["input"])):
            lines[-1] += (
                "; Kubernetes sets this for a Service named timesformer: "
                "set enableServiceLinks: false in the pod"
            )
    return lines
