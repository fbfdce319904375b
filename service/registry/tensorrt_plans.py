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

from export.bundle.bundle import Bundle
from export.runtime import Runtime, RuntimeUnavailableError
from export.runtime.cuda import count_gpus
from export.runtime.plans import Plan, PlanError, PlanKey, batches_up_to, find_plan
from export.runtime.tensorrt import TensorRt, Wanted
from export.tensorrt.builder import BuildJob, Progress, build_plan
from export.verification.engine_check import prove_or_close
from service.settings import Settings

logger = logging.getLogger(__name__)


class TensorRtState(NamedTuple):
    """TensorRT's status, and the reason if TensorRT is not serving."""

    state: str
    """`serving`, `building`, `missing`, `failed`, `unavailable` or `off`."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state

    @property
    def is_building(self) -> bool:
        return self.state == "building"


OFF = TensorRtState("off", "TIMESFORMER_TENSORRT")
SERVING = TensorRtState("serving")
BUILDING = TensorRtState("building")
MISSING = TensorRtState("missing", "no plan fits: run `timesformer engines build` on this machine")


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
        if settings.precision == "fp8":
            logger.warning("precision fp8 needs TensorRT: %s", error)
        return (), TensorRtState("unavailable", str(error))


class Engines:
    """The plans of bundles for some GPUs; those of a kind share one.

    Args:
        tensorrt: each of the GPUs.
        largest: most clips in a batch.
        precision: of the graph, as the settings have it.
        refittable: whether plans are built so that later versions' weights can be put into them.
        builds: whether missing plans are to be built.
    """

    def __init__(
        self,
        tensorrt: Sequence[TensorRt],
        largest: int,
        precision: str,
        refittable: bool = False,
        builds: bool = True,
    ) -> None:
        self._gpus = tensorrt
        self._largest = largest
        self._precision = precision
        self._refittable = refittable
        self.without_plan = BUILDING if builds else MISSING
        """The status of a bundle that has no plan that fits."""
        self._not_refitted: set[Path] = set()
        """Graphs whose plans had wrong answers when they were refitted."""
        self._child: subprocess.Popen[str] | None = None
        self.stopped = False
        self._lock = threading.Lock()
        self.building = asyncio.Lock()
        """To be held around `build`: each build wants the GPU and its memory."""

    def find(self, bundle: Bundle) -> tuple[Plan, ...] | None:
        """Returns the bundle's plan for each GPU, or None if a plan is missing for one of them.

        Raises:
            PlanError: the bundle has no graph that TensorRT takes in this precision.
        """
        found = [
            find_plan(wanted.folder, wanted.key, wanted.graph_sha256)
            for wanted in self._wanted(bundle)
        ]
        plans = tuple(plan for plan in found if plan is not None)
        return plans if len(plans) == len(found) else None

    def build(
        self, bundle: Bundle, progress: Progress = lambda share, step: None
    ) -> tuple[Plan, ...]:
        """Builds the bundle's missing plans and returns the plan for each GPU.

        A build takes minutes and runs in a child process, one plan at a time.

        Raises:
            PlanError: a plan cannot be built, or `stop` was called.
        """
        plans: dict[PlanKey, Plan] = {}
        wanted = self._wanted(bundle)
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
            closing.pop_all()
        prove_or_close(runtimes, bundle)
        return tuple(runtimes)

    def after(self, bundle: Bundle, error: Exception) -> TensorRtState:
        """Returns TensorRT's status once the bundle's plan failed with this error.

        A refitted plan with wrong answers is removed, so that the plan is built instead.
        """
        reason = str(error)
        with contextlib.suppress(RuntimeError):  # no such graph, or the GPUs differ or are lost
            if isinstance(error, PlanError) and self._remove_refitted(bundle):
                logger.warning("refitted plan refused", extra={"reason": reason})
                return self.without_plan
            if self._precision == "auto":
                reason = (
                    f"{self._wanted(bundle)[0].key.precision}: {reason}; `timesformer engines "
                    "choose` finds a precision that works here, TIMESFORMER_PRECISION names one"
                )
        return TensorRtState("failed", reason)

    def stop(self) -> None:
        """Ends the build that runs, and any that begins later."""
        with self._lock:
            self.stopped = True
            if self._child is not None:
                self._child.terminate()

    def _wanted(self, bundle: Bundle) -> list[Wanted]:
        """For each GPU."""
        batches = batches_up_to(self._largest)
        wanted = [gpu.wanted(bundle, self._precision, batches) for gpu in self._gpus]
        precisions = {each.key.precision for each in wanted}
        if len(precisions) > 1:  # a video's answer would depend on which GPU was idle
            raise PlanError(
                f"the GPUs would compute in {' and '.join(sorted(precisions))}: "
                "set TIMESFORMER_PRECISION to one that all of them have"
            )
        return wanted

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

    def _remove_refitted(self, bundle: Bundle) -> bool:
        """Removes the bundle's plans that were refitted and returns whether there were any."""
        plans = self.find(bundle) or ()
        refitted = [plan for plan in plans if plan.facts.refitted]
        try:
            for plan in refitted:
                plan.path.with_suffix(".json").unlink(missing_ok=True)
        except OSError:  # it would come back
            return False
        if refitted:
            self._not_refitted.update(each.graph for each in self._wanted(bundle))
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
