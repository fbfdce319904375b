"""TensorRT at serving: the plan that fits, proven before it answers anyone, or none.

Whether a plan is right is asked here again and not only at the export: the builder on this machine
chose other kernels than any other one, and a plan may have been refitted.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from typing import NamedTuple

import numpy as np

from export.bundle import ONNX_FLOAT32, Bundle
from export.runtime import Runtime, RuntimeUnavailableError
from export.runtime.plans import Plan, PlanError, batches_up_to, find_plan
from export.runtime.tensorrt import TensorRt, Wanted
from export.tensorrt import BuildJob, Progress, build_plan
from export.verify import LIMITS, compare, run_in_batches
from model.demo import SAMPLE_CLIP
from model.video import load_clips
from service.settings import Settings

logger = logging.getLogger(__name__)


class TensorRtState(NamedTuple):
    """What TensorRT is at, and why if it does not serve."""

    state: str
    """`serving`, `building`, `failed`, `unavailable` or `off`."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


OFF = TensorRtState("off", "TIMESFORMER_TENSORRT")
SERVING = TensorRtState("serving")
BUILDING = TensorRtState("building")


def find_tensorrt(settings: Settings) -> tuple[TensorRt | None, TensorRtState]:
    """TensorRT on this machine's GPU, or None and why not."""
    if settings.tensorrt == "off":
        return None, OFF
    if settings.device == "cpu":
        return None, TensorRtState("off", "the CPU is to be used")
    try:
        return TensorRt(settings.gpu, settings.engines), BUILDING
    except RuntimeUnavailableError as error:
        if settings.precision in ("fp16", "fp8"):
            logger.warning("precision %s needs TensorRT: %s", settings.precision, error)
        return None, TensorRtState("unavailable", str(error))


class Engines:
    """The plans of bundles for one GPU.

    Args:
        tensorrt: the GPU.
        largest: most clips in a batch.
        precision: of the graph, as the settings have it.
    """

    def __init__(self, tensorrt: TensorRt, largest: int, precision: str) -> None:
        self._tensorrt = tensorrt
        self._largest = largest
        self._precision = precision
        self._child: subprocess.Popen[str] | None = None
        self.stopped = False
        self._lock = threading.Lock()
        self._building = threading.Lock()

    def find(self, bundle: Bundle) -> Plan | None:
        """The bundle's plan, if there is one that fits.

        Raises:
            PlanError: the bundle has no graph that TensorRT takes in this precision.
        """
        wanted = self._wanted(bundle)
        return find_plan(wanted.folder, wanted.key, wanted.graph_sha256)

    def build(self, bundle: Bundle, progress: Progress = lambda share, step: None) -> Plan:
        """Builds the bundle's plan, in minutes, in a child process; one plan at a time, as each
        build wants the GPU and its memory.

        Raises:
            PlanError: it cannot be built, or `stop` was called.
        """
        with self._building:
            if self.stopped:
                raise PlanError("the service stops")
            job = BuildJob.of(self._wanted(bundle), gpu_index=self._tensorrt.cuda.index)
            return build_plan(job, progress, on_start=self._started)

    def load(self, plan: Plan, bundle: Bundle) -> Runtime:
        """Loads a plan and compares it with the float32 network.

        Raises:
            RuntimeUnavailableError: it cannot be loaded.
            PlanError: it fails on clips, or its answers are not the network's.
        """
        runtime = self._tensorrt.load(plan, self._largest)
        try:
            prove(runtime, bundle)
        except PlanError:
            runtime.close()
            raise
        except Exception as error:  # engines' exceptions share no base but Exception
            runtime.close()
            raise PlanError(f"the plan fails on clips: {error}") from error
        return runtime

    def stop(self) -> None:
        """Ends the build that runs, and any that begins later."""
        with self._lock:
            self.stopped = True
            if self._child is not None:
                self._child.terminate()

    def _wanted(self, bundle: Bundle) -> Wanted:
        return self._tensorrt.wanted(bundle, self._precision, batches_up_to(self._largest))

    def _started(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._child = child
            if self.stopped:
                child.terminate()


def prove(runtime: Runtime, bundle: Bundle) -> None:
    """Compares an engine with the bundle's float32 graph on the CPU: a video's crops and noise.

    Raises:
        PlanError: the answers differ by more than the gate of the export allows.
    """
    from export.runtime.onnxruntime import OnnxRuntime

    preprocessing = bundle.config.preprocessing
    seen = load_clips(SAMPLE_CLIP, preprocessing, crops=3).frames
    noise = np.random.default_rng(0).integers(0, 256, (1, *seen.shape[1:]), dtype=np.uint8)
    clips = np.concatenate([seen, noise])
    reference = OnnxRuntime(bundle.file(ONNX_FLOAT32), cuda=False)
    try:
        parity = compare(
            run_in_batches(reference, clips),
            run_in_batches(runtime, clips),
            LIMITS[runtime.precision],
        )
    finally:
        reference.close()
    if not parity.passed:
        raise PlanError(
            f"the plan's answers are not the network's: logits differ by "
            f"{parity.max_difference:.3g}, cosine {parity.centred_cosine:.5f}"
        )
