"""What earlier builds leave for the next one: the builder's measurements, and plans whose weights
can be replaced. Both are looked for beside the plans of the bundle's other versions too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from export.runtime.plans import (
    FOLDER,
    Plan,
    PlanError,
    PlanFacts,
    PlanKey,
    locked,
    plans_in,
    read_plan,
    write_whole,
)
from export.runtime.tensorrt import made


def timings_file(folder: Path, key: PlanKey) -> Path:
    """The file of measurements in a folder, which are of one kind of GPU and one TensorRT."""
    return folder / f"{key.hardware}.timings"


def earlier_timings(folder: Path, key: PlanKey) -> tuple[Path, ...]:
    """Measurements of that GPU and TensorRT beside the plans of other versions, the newest first.

    Args:
        folder: of this version's plans; the others' lie as theirs do, `VERSION/...` beside it.
    """
    dated = []
    for other in _other_versions(folder):
        with contextlib.suppress(OSError):  # most have none
            file = timings_file(other, key)
            dated.append((file.stat().st_mtime, file))
    return tuple(file for _, file in sorted(dated, reverse=True))


def refit_sources(folder: Path, key: PlanKey) -> tuple[Path, ...]:
    """Facts of the refittable plans of that key among the other versions' plans, the newest first.

    Args:
        folder: as in `earlier_timings`.
    """
    plans = [
        plan
        for other in _other_versions(folder)
        for plan in plans_in(other)
        if plan.facts.refittable and plan.facts.key == key
    ]
    plans.sort(key=lambda plan: plan.facts.created, reverse=True)
    return tuple(plan.path.with_suffix(".json") for plan in plans)


def _other_versions(folder: Path) -> Iterator[Path]:
    inside = folder.name == FOLDER
    version = folder.parent if inside else folder
    for other in version.parent.glob("*"):
        if other != version:
            yield other / FOLDER if inside else other


# ---- measurements -------------------------------------------------------------------------------


def use_timings(config: Any, files: Sequence[Path], log: Any) -> None:
    """Starts from what earlier builds measured, in the first of the files that is there; a cache
    that does not fit is begun anew."""
    found = next((file for file in files if file.is_file()), None)
    try:
        cache = config.create_timing_cache(found.read_bytes() if found else b"")
    except OSError:
        cache = None
    if cache is not None and config.set_timing_cache(cache, False):
        return
    if found is not None:
        log.warnings.append(f"{found.name} is of another GPU or TensorRT, or damaged: begun anew")
    cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)


def keep_timings(config: Any, path: Path, log: Any) -> None:
    """Adds what this build measured to the file, beside what others did meanwhile. What they did
    elsewhere is not taken: it would choose this GPU's kernels."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            others = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
            if others is not None and not cache.combine(others, False):
                log.warnings.append(f"{path.name} was of another GPU or TensorRT, and is replaced")
            write_whole(path, bytes(cache.serialize()))
    except (PlanError, OSError) as error:  # the plan itself is good
        log.warnings.append(f"the builder's measurements were not kept: {error}")


# ---- plans of other weights ---------------------------------------------------------------------


def fitting_source(
    sources: Sequence[Path], key: PlanKey, structure: str, level: int
) -> Plan | None:
    """The first refittable plan of the same network with other weights, built as hard at least."""
    for source in sources:
        with contextlib.suppress(ValidationError, OSError):
            facts = PlanFacts.model_validate_json(source.read_bytes())
            same = facts.key == key and facts.structure == structure
            if same and facts.refittable and facts.level >= level:
                return Plan(source.with_suffix(".plan"), facts)
    return None


def refit(trt: ModuleType, plan: Plan, graph: Path, log: Any) -> bytes:
    """The plan with the weights of another graph of the same structure; seconds, not minutes.

    Raises:
        PlanError: the plan is damaged or cannot be loaded here, or the weights do not fit.
    """
    content = read_plan(plan)
    runtime = made(trt.Runtime, log, log)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise PlanError(f"TensorRT cannot load {plan.path.name} to refit it: {log.why()}")
    refitter = made(trt.Refitter, log, engine, log)
    parser = made(trt.OnnxParserRefitter, log, refitter, log)
    missing = []
    if parser.refit_from_file(str(graph)):
        missing = refitter.get_missing_weights()
        if not missing and refitter.refit_cuda_engine():
            config = engine.create_serialization_config()
            config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
            config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
            return bytes(engine.serialize_with_config(config))
    problem = f"no weights for {', '.join(missing)}" if missing else log.why()
    raise PlanError(f"{plan.path.name} cannot be refitted with {graph.name}: {problem}")
