"""TensorRT at serving: the plan that fits, proven before it answers anyone, or none.

Whether a plan is right is asked here again and not only at the export: the builder on this machine
chose other kernels than any other one, and a plan may have been refitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from export.bundle import Bundle
from export.runtime import Runtime, RuntimeUnavailableError, device_name
from export.runtime.cuda import count_gpus
from export.runtime.plans import Plan, PlanError, PlanKey, batches_up_to, find_plan
from export.runtime.tensorrt import TensorRt, Wanted
from export.tensorrt import BuildJob, Progress, build_plan
from service.settings import Settings

logger = logging.getLogger(__name__)


class Refused(NamedTuple):
    """A precision of a bundle that does not serve, though it is the faster one."""

    precision: str
    reason: str


class TensorRtState(NamedTuple):
    """What TensorRT is at, and why if it does not serve as it was to."""

    state: str
    """`serving`, `building`, `failed`, `unavailable` or `off`."""
    reason: str = ""
    refused: tuple[Refused, ...] = ()
    """What was tried before, with precision `auto`."""

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state

    @property
    def is_building(self) -> bool:
        return self.state == "building"

    def serving(self) -> TensorRtState:
        """The same once the plan serves."""
        return self._replace(state="serving")


OFF = TensorRtState("off", "TIMESFORMER_TENSORRT")
BUILDING = TensorRtState("building")


def find_gpus(settings: Settings) -> tuple[int, ...]:
    """The GPUs that the settings name, whether or not they can be used.

    Raises:
        RuntimeUnavailableError: there are others, but not these; or it cannot be found out which
            are all, and one must be used.
    """
    named = settings.gpus
    try:
        count = count_gpus()
    except RuntimeUnavailableError as error:
        if named is None and settings.device == "cuda":
            raise RuntimeUnavailableError(f"TIMESFORMER_GPU=all: {error}") from error
        if named is None:
            logger.warning("TIMESFORMER_GPU=all: GPUs cannot be counted, one is taken: %s", error)
        return named or (0,)  # whoever loads an engine there says what is missing
    if named is None:
        return tuple(range(count))
    if absent := [gpu for gpu in named if gpu >= count]:
        raise RuntimeUnavailableError(
            f"TIMESFORMER_GPU: there is no GPU {absent[0]}; {count} can be seen, from 0 on"
        )
    return named


def find_tensorrt(settings: Settings) -> tuple[tuple[TensorRt, ...], TensorRtState]:
    """TensorRT on each of the GPUs that the settings name, or on none and why not.

    Raises:
        RuntimeUnavailableError: as `find_gpus`.
    """
    if settings.tensorrt == "off":
        return (), OFF
    if settings.device == "cpu":
        return (), TensorRtState("off", "the CPU is to be used")
    gpus = find_gpus(settings)
    try:
        return tuple(TensorRt(gpu, settings.engines) for gpu in gpus), BUILDING
    except RuntimeUnavailableError as error:
        if settings.precision in ("fp16", "fp8"):
            logger.warning("precision %s needs TensorRT: %s", settings.precision, error)
        return (), TensorRtState("unavailable", str(error))


class Engines:
    """The plans of bundles for some GPUs; those of a kind share one.

    Args:
        tensorrt: each of the GPUs.
        largest: most clips in a batch.
        precision: of the graph, as the settings have it.
        refittable: whether plans are built so that later versions' weights can be put into them.
    """

    def __init__(
        self,
        tensorrt: Sequence[TensorRt],
        largest: int,
        precision: str,
        refittable: bool = False,
    ) -> None:
        self._gpus = tensorrt
        self._largest = largest
        self._precision = precision
        self._refittable = refittable
        self._not_refitted: set[Path] = set()
        """Graphs whose plans had wrong answers when they were refitted."""
        self._child: subprocess.Popen[str] | None = None
        self.stopped = False
        self._lock = threading.Lock()
        self.building = asyncio.Lock()
        """To be held around `build`: each build wants the GPU and its memory."""

    def find(self, bundle: Bundle, refused: Sequence[Refused] = ()) -> tuple[Plan, ...] | None:
        """The bundle's plan for each GPU, if all have one that fits.

        Args:
            refused: precisions that are not to be taken.

        Raises:
            PlanError: the bundle has no graph that TensorRT takes in this precision.
        """
        found = [
            find_plan(wanted.folder, wanted.key, wanted.graph_sha256)
            for wanted in self._wanted(bundle, refused)
        ]
        plans = tuple(plan for plan in found if plan is not None)
        return plans if len(plans) == len(found) else None

    def build(
        self,
        bundle: Bundle,
        refused: Sequence[Refused] = (),
        progress: Progress = lambda share, step: None,
    ) -> tuple[Plan, ...]:
        """Builds what is missing of the bundle's plans, in minutes each, in child processes, one
        plan at a time. One for each GPU comes back.

        Args:
            refused: precisions that are not to be taken.

        Raises:
            PlanError: one cannot be built, or `stop` was called.
        """
        plans: dict[PlanKey, Plan] = {}
        wanted = self._wanted(bundle, refused)
        for gpu, each in zip(self._gpus, wanted, strict=True):
            if self.stopped:
                raise PlanError("the service stops")
            if each.key not in plans:
                plans[each.key] = self._built(each, gpu.cuda.index, progress)
        return tuple(plans[each.key] for each in wanted)

    def load(self, plans: Sequence[Plan], bundle: Bundle) -> tuple[Runtime, ...]:
        """Loads each GPU's plan and compares it with the float32 network: all of them or none.

        Raises:
            RuntimeUnavailableError: one cannot be loaded.
            PlanError: one fails on clips, or its answers are not the network's.
        """
        with contextlib.ExitStack() as closing:
            runtimes = []
            for gpu, plan in zip(self._gpus, plans, strict=True):
                runtimes.append(_load(gpu, plan, self._largest))
                closing.callback(runtimes[-1].close)
            try:
                prove(runtimes, bundle)
            except PlanError:
                raise
            except Exception as error:  # engines' exceptions share no base but Exception
                raise PlanError(f"the plan fails on clips: {error}") from error
            closing.pop_all()
        return tuple(runtimes)

    def stand_in(self, bundle: Bundle, refused: Sequence[Refused]) -> tuple[Runtime, ...] | None:
        """With precision `auto`, plans of a later graph that are there already, loaded and proven,
        to serve while those of the first are built."""
        while self._precision == "auto":
            try:
                refused = (*refused, Refused(self.precision(bundle, refused), "is to be built"))
                if plans := self.find(bundle, refused):
                    return self.load(plans, bundle)
            except (PlanError, RuntimeUnavailableError) as error:
                if not self._is_left(bundle, refused):
                    break
                logger.warning("a plan cannot stand in", extra={"reason": str(error)})
        return None

    def precision(self, bundle: Bundle, refused: Sequence[Refused]) -> str:
        """Which one is to be served.

        Raises:
            PlanError: none is left.
        """
        return self._wanted(bundle, refused)[0].key.precision

    def after(self, state: TensorRtState, bundle: Bundle, error: Exception) -> TensorRtState:
        """What TensorRT is at next, since the plan that it was at came to nothing: with precision
        `auto` the next graph that the bundle has, and `failed` after the last one. A refitted plan
        with wrong answers is removed, and built instead."""
        try:
            precision = self.precision(bundle, state.refused)
            if isinstance(error, PlanError) and self._remove_refitted(bundle, state.refused):
                logger.warning("refitted plan refused, it is built", extra={"reason": str(error)})
                return state
        except RuntimeError:  # the bundle has none from the start, the GPUs differ or one is lost
            return TensorRtState("failed", str(error))
        refused = (*state.refused, Refused(precision, str(error)))
        if self._precision != "auto":
            return TensorRtState("failed", str(error), refused)
        reason = "; ".join(f"not in {each.precision}: {each.reason}" for each in refused)
        goes_on = "building" if self._is_left(bundle, refused) else "failed"
        return TensorRtState(goes_on, reason, refused)

    def stop(self) -> None:
        """Ends the build that runs, and any that begins later."""
        with self._lock:
            self.stopped = True
            if self._child is not None:
                self._child.terminate()

    def _wanted(self, bundle: Bundle, refused: Sequence[Refused]) -> list[Wanted]:
        """For each GPU."""
        batches = batches_up_to(self._largest)
        without = frozenset(each.precision for each in refused)
        wanted = [gpu.wanted(bundle, self._precision, batches, without) for gpu in self._gpus]
        precisions = {each.key.precision for each in wanted}
        if len(precisions) > 1:  # a video's answer would depend on who was idle
            raise PlanError(
                f"the GPUs would compute in {' and '.join(sorted(precisions))}: "
                "set TIMESFORMER_PRECISION to one that all of them have"
            )
        return wanted

    def _is_left(self, bundle: Bundle, refused: Sequence[Refused]) -> bool:
        """Whether there is a graph to be tried."""
        try:
            self._wanted(bundle, refused)
        except RuntimeError:
            return False
        return True

    def _built(self, wanted: Wanted, gpu: int, progress: Progress) -> Plan:
        """The plan that is there, however it was built, or a new one."""
        if found := find_plan(wanted.folder, wanted.key, wanted.graph_sha256):
            return found
        job = BuildJob.of(wanted, gpu_index=gpu, refittable=self._refittable)
        if wanted.graph in self._not_refitted:
            job = job.model_copy(update={"refit_from": ()})
        plan = build_plan(job, progress, on_start=self._started)
        for warning in plan.facts.warnings:
            facts = {"plan": plan.path.name, "reason": warning}
            logger.warning("plan built with a warning", extra=facts)
        return plan

    def _remove_refitted(self, bundle: Bundle, refused: Sequence[Refused]) -> bool:
        """Whether the bundle's plan was made of another version's; it is gone then, for good."""
        plans = self.find(bundle, refused) or ()
        refitted = [plan for plan in plans if plan.facts.refitted]
        try:
            for plan in refitted:
                plan.path.with_suffix(".json").unlink(missing_ok=True)
        except OSError:  # it would come back
            return False
        if refitted:
            self._not_refitted.update(each.graph for each in self._wanted(bundle, refused))
        return bool(refitted)

    def _started(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._child = child
            if self.stopped:
                child.terminate()


def _load(gpu: TensorRt, plan: Plan, largest: int) -> Runtime:
    try:
        return gpu.load(plan, largest)
    except (PlanError, RuntimeUnavailableError):
        raise
    except Exception as error:  # TensorRT's bindings raise what they like
        raise RuntimeUnavailableError(f"{plan.path.name} cannot run: {error}") from error


def prove(runtimes: Sequence[Runtime], bundle: Bundle) -> None:
    """Compares engines with the bundle's float32 graph on the CPU.

    Raises:
        PlanError: the answers differ by more than the gate of the export allows.
    """
    from export.proof import Proof, shortfall

    proof = Proof.of(bundle)
    for runtime in runtimes:
        parity, where = proof.judge(runtime), device_name(runtime)
        if not parity.passed:
            raise PlanError(
                f"the plan's answers are not the network's on {where}: {shortfall(parity)}"
            )
        facts = {
            "engine_device": where,
            "precision": runtime.precision,
            "clips": parity.clips,
            "max_difference": parity.max_difference,
            "cosine": parity.centred_cosine,
        }
        logger.info("plan proven", extra=facts)
