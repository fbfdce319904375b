"""TensorRT plans on disk: what one is keyed by, and which of them fits the GPU at hand.

A plan is `FOLDER/STEM.plan` with `STEM.json` beside it. The JSON is written last: a plan without
one is half a plan and is not seen.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.bundle.bundle import Bundle, sha256_of
from export.bundle.manifest import ONNX_FLOAT32, ONNX_FP8, ONNX_FP16, ONNX_INT8_QDQ, FileEntry
from model.files import lock_file, write_atomic

FOLDER = "engines"
# Batches that profiles are tuned for, unless told otherwise.
BATCHES = (1, 8, 32)
GPU_GRAPHS = {
    "fp8": ONNX_FP8,
    "int8": ONNX_INT8_QDQ,
    "fp16": ONNX_FP16,
    "float32": ONNX_FLOAT32,
}
"""The file that TensorRT takes for each precision, by the rate of matrix products the fastest
first: FP8 and INT8 have twice that of FP16."""
# The first GPUs with a type, by compute capability: Ada for FP8.
_NEEDS = {"fp8": (8, 9)}


class PlanError(RuntimeError):
    """A plan cannot be built, written or used; the message says why."""


class Gpu(NamedTuple):
    """What a plan depends on of the device."""

    name: str
    compute_capability: str
    """Such as `9.0`."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanKey(_Model):
    """A plan runs where all of this is the same."""

    gpu: str
    compute_capability: str
    tensorrt: str
    precision: str
    batches: tuple[int, ...] = Field(
        min_length=1, description="what the profiles are tuned for, and their largest batches"
    )

    @property
    def hardware(self) -> str:
        """GPU and TensorRT as the beginning of a file name."""
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        architecture = self.compute_capability.replace(".", "")
        return f"{gpu}_sm{architecture}_trt{self.tensorrt}"

    @property
    def stem(self) -> str:
        """The file name without its ending."""
        batches = "-".join(map(str, self.batches))
        return f"{self.hardware}_{self.precision}_b{batches}"


class PlanFacts(_Model):
    """`STEM.json`."""

    schema_version: Literal[1] = 1
    key: PlanKey
    graph_sha256: str = Field(description="of the ONNX file that it was built from")
    plan: FileEntry
    created: datetime
    seconds: float = Field(description="that the build took")
    refitted: bool = Field(False, description="made from another plan by changing its weights")
    refittable: bool
    level: int = Field(description="the builder's optimisation level")
    structure: str = Field(description="hash of the network without its weights")
    network: dict[str, dict[str, int]] = Field(
        description="layers that compute, by kind and by the type of what they give"
    )
    engine: dict[str, dict[str, int]] | None = Field(
        None, description="the same of the engine, as its inspector names kinds and types"
    )
    products: dict[str, int] | None = Field(
        None, description="the engine's matrix products by the type that they compute in"
    )
    warnings: tuple[str, ...] = ()


class Fastest(_Model):
    """`HARDWARE.fastest`: how fast each precision of a bundle is on a kind of GPU."""

    schema_version: Literal[1] = 1
    gpu: str
    compute_capability: str
    tensorrt: str
    graphs: dict[str, str] = Field(description="hash of the graph of each precision")
    batch: int = Field(description="clips that went through together")
    milliseconds: dict[str, float] = Field(
        description="of a clip, the median, by precision; they took turns"
    )
    refused: dict[str, str] = Field(description="precisions whose plans came to nothing, and why")
    created: datetime

    @property
    def order(self) -> tuple[str, ...]:
        """The fastest first."""
        return tuple(sorted(self.milliseconds, key=lambda each: self.milliseconds[each]))


class Plan(NamedTuple):
    path: Path
    facts: PlanFacts


def layers_file(plan: Path) -> Path:
    """Where the engine inspector's whole answer lies, if the machine could load the engine."""
    return plan.with_suffix(".layers")


def profiles(batches: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Least, best and largest batch of each profile; together they leave no size out.

    Raises:
        PlanError: the batches are not positive and rising.
    """
    if not batches or batches[0] < 1 or any(a >= b for a, b in itertools.pairwise(batches)):
        raise PlanError(f"batches must be positive and rising, not {list(batches)}")
    return [(low + 1, high, high) for low, high in itertools.pairwise((0, *batches))]


def batches_up_to(largest: int) -> tuple[int, ...]:
    """The default batches, and `largest` if it is beyond them."""
    return BATCHES if largest <= BATCHES[-1] else (*BATCHES, largest)


def engines_folder(bundle: Bundle, engines: Path | None = None) -> Path:
    """Where a bundle's plans lie: inside it, or in a folder for plans."""
    return engines / bundle.name / bundle.version if engines else bundle.path / FOLDER


def graphs_of(bundle: Bundle) -> dict[str, str]:
    """Hashes of the graphs that TensorRT takes, by precision."""
    files = bundle.manifest.files
    return {name: files[file].sha256 for name, file in GPU_GRAPHS.items() if file in files}


def fastest_file(folder: Path, key: PlanKey) -> Path:
    """Where the measurements of a kind of GPU lie."""
    return folder / f"{key.hardware}.fastest"


def measured_order(folder: Path, key: PlanKey, bundle: Bundle) -> tuple[str, ...]:
    """Precisions, the fastest first, if they were measured on such a GPU, with this TensorRT and on
    the graphs that the bundle has now; else none."""
    try:
        found = Fastest.model_validate_json(fastest_file(folder, key).read_bytes())
    except (OSError, ValidationError):
        return ()
    hardware = (found.gpu, found.compute_capability, found.tensorrt)
    if hardware != (key.gpu, key.compute_capability, key.tensorrt):
        return ()
    return found.order if found.graphs == graphs_of(bundle) else ()


def graph_of(
    bundle: Bundle,
    precision: str,
    compute_capability: str,
    measured: Sequence[str] = (),
) -> tuple[str, Path, str]:
    """Precision, path and hash of the graph that a plan is to be built from.

    Args:
        precision: one of `GPU_GRAPHS`; `auto` takes the fastest that the bundle has and the GPU can
            compute in, in the order that was measured, else in that which the export noted.
        compute_capability: of the GPU, such as `9.0`.
        measured: by `measured_order`.

    Raises:
        PlanError: the bundle has no such graph, or the GPU does not compute in this precision.
    """
    noted = bundle.manifest.fastest.get("gpu")
    order = measured or (noted.order if noted else tuple(GPU_GRAPHS))
    for name in order if precision == "auto" else (precision,):
        file = GPU_GRAPHS.get(name, "")
        can = _version(compute_capability) >= _NEEDS.get(name, (0,))
        if not can and precision != "auto":
            raise PlanError(
                f"a GPU of compute capability {compute_capability} has no {name}: it takes "
                f"{'.'.join(map(str, _NEEDS[name]))}; set the precision to auto"
            )
        if can and file in bundle.manifest.files:
            return name, bundle.file(file), bundle.manifest.files[file].sha256
    raise PlanError(
        f"bundle {bundle.name} version {bundle.version} has no graph of precision {precision} "
        f"that TensorRT takes: export it with --precision {precision}"
    )


def _version(dotted: str) -> tuple[int, ...]:
    return tuple(int(part) for part in dotted.split("."))


def plans_in(folder: Path) -> Iterator[Plan]:
    """The plans of a folder, those that are whole; nothing about whether they fit."""
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(ValidationError, OSError):  # no facts, no plan
            plan = Plan(path.with_suffix(".plan"), PlanFacts.model_validate_json(path.read_bytes()))
            if plan.path.stat().st_size == plan.facts.plan.size:
                yield plan


def find_plan(
    folder: Path, key: PlanKey, graph_sha256: str, *, level: int = 0, refittable: bool = False
) -> Plan | None:
    """The plan of that key and graph; its batches may also reach further.

    Args:
        level: the least that it was built with.
        refittable: whether it must be.
    """
    fitting = [
        plan
        for plan in plans_in(folder)
        if plan.facts.graph_sha256 == graph_sha256
        and plan.facts.key.model_copy(update={"batches": key.batches}) == key
        and plan.facts.key.batches[-1] >= key.batches[-1]
        and plan.facts.level >= level
        and (plan.facts.refittable or not refittable)
    ]
    return max(
        fitting,
        key=lambda plan: (plan.facts.key.batches == key.batches, plan.facts.created),
        default=None,
    )


def read_plan(plan: Plan) -> bytes:
    """The plan's bytes, checked against the hash beside it.

    Raises:
        PlanError: they are not what was built, or cannot be read.
    """
    try:
        if sha256_of(plan.path) != plan.facts.plan.sha256:
            raise PlanError(f"{plan.path} is not the plan that was built: remove it")
        return plan.path.read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read {plan.path}: {error.strerror}") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks the file `path` for this process, by a file beside it.

    Raises:
        PlanError: the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_file(path.with_name(f".{path.name}.lock")))
        except OSError as error:
            raise PlanError(f"cannot write into {path.parent}: {error.strerror}") from error
        yield


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes or replaces a file as a whole; the caller has locked `path`.

    Raises:
        PlanError: the disk is full or cannot be written to.
    """
    try:
        write_atomic(path, content, durable=True)
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}") from error
