"""The TensorRT engine builder: an ONNX graph to a plan for one GPU, in a process of its own.

    python -m export.tensorrt.builder JOB   # `build_plan` starts it; reports progress in JSON lines

Networks are strongly typed: precision is what the graph says. The builder is native code that may
take minutes and crash, so that it never runs in the process that serves or exports. Needs TensorRT,
no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.bundle.manifest import FileEntry
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import (
    Plan,
    PlanError,
    PlanFacts,
    PlanKey,
    find_plan,
    layers_file,
    locked,
    profiles,
    write_whole,
)
from export.runtime.tensorrt import INPUT, OUTPUTS, Wanted, load_tensorrt, log_of, made
from export.tensorrt.build_cache import (
    earlier_timings,
    fitting_source,
    keep_timings,
    refit,
    refit_sources,
    timings_file,
    use_timings,
)
from export.tensorrt.inspector import Inspected, missing_bits, read_layers

# Layers that only move, reshape or count; what is left of a network says in what it computes.
_PLUMBING = {
    "CAST",
    "CONCATENATION",
    "CONSTANT",
    "GATHER",
    "IDENTITY",
    "SHAPE",
    "SHUFFLE",
    "SLICE",
    "SQUEEZE",
    "UNSQUEEZE",
}
_COUNTING = {"INT32", "INT64"}
# Kinds of layers that compute different things, and the class that says which.
_OPERATIONS = {
    "ELEMENTWISE": "IElementWiseLayer",
    "REDUCE": "IReduceLayer",
    "UNARY": "IUnaryLayer",
}
_HALF_NORMS = (
    "the graph has a LayerNorm in FP16, whose variance overflows on real residuals: "
    "LayerNorm must stay in FP32"
)
_TAIL = 2000
_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL}

logger = logging.getLogger(__name__)

Progress = Callable[[float, str], None]
"""Is told the share that is done, 0 to 1, and what is being done."""


class BuildJob(BaseModel):
    """What the child is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    graph: Path
    graph_sha256: str
    folder: Path = Field(description="where the plan goes; made if it is not there")
    key: PlanKey
    gpu_index: int = 0
    level: int = Field(3, ge=0, le=5, description="optimisation level: more is slower to build")
    workspace_bytes: int | None = Field(None, ge=1, description="most scratch memory of a layer")
    timings: Path | None = Field(None, description="file of the builder's measurements")
    earlier_timings: tuple[Path, ...] = Field(
        (), description="to begin with, where that is not there"
    )
    refittable: bool = False
    refit_from: tuple[Path, ...] = Field(
        (), description="facts of refittable plans, one of which may be of the same network"
    )
    rebuild: bool = Field(False, description="whether or not it is there; measures anew")
    module: str = "tensorrt"

    @classmethod
    def of(cls, wanted: Wanted, timings_in: Path | None = None, **options: Any) -> BuildJob:
        """The job of building what is wanted, with what earlier builds left.

        Args:
            timings_in: folder of the builder's measurements; by default beside the plans.
            options: fields that are not in `wanted`.
        """
        folder, key = wanted.folder, wanted.key
        refits = options.get("refittable") and not options.get("rebuild")
        found: dict[str, Any] = {
            "timings": timings_file(timings_in or folder, key),
            "earlier_timings": earlier_timings(folder, key),
            "refit_from": refit_sources(folder, key) if refits else (),
        }
        return cls(**wanted._asdict(), **{**found, **options})

    @property
    def plan(self) -> Path:
        return self.folder / f"{self.key.stem}.plan"


def find_built(job: BuildJob) -> Plan | None:
    """The plan of a job if it is there already, built as hard at least and refittable if it is to
    be."""
    if job.rebuild:
        return None
    return find_plan(
        job.folder, job.key, job.graph_sha256, level=job.level, refittable=job.refittable
    )


def build_plan(
    job: BuildJob,
    progress: Progress = lambda share, step: None,
    on_start: Callable[[subprocess.Popen[str]], None] = lambda child: None,
) -> Plan:
    """Builds a plan in a child process, unless it is there already.

    Builders of the same plan wait for each other, and the second finds the first one's. A build
    that fails or is killed leaves nothing behind that `find_plan` would take.

    Args:
        on_start: is given the child, to stop it with.

    Raises:
        PlanError: the plan could not be built, with the builder's reasons; also when the builder
            crashed or was stopped.
    """
    profiles(job.key.batches)  # a mistake in them is told at once
    if found := find_built(job):
        return found
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "export.tensorrt.builder", job.model_dump_json()]
        with subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child:
            on_start(child)
            try:
                problem = _follow(child.stdout or (), progress)
            except BaseException:
                child.kill()
                raise
        errors.seek(0)
        last_words = errors.read()[-_TAIL:].strip()
    if problem is not None:
        raise PlanError(problem)
    if child.returncode in _CRASHES and job.refit_from:
        logger.warning("refitting crashed, the plan is built: %s", last_words)
        return build_plan(job.model_copy(update={"refit_from": ()}), progress, on_start)
    if child.returncode:
        raise PlanError(_epitaph(child.returncode, last_words))
    found = find_built(job.model_copy(update={"rebuild": False}))
    if found is None:
        raise PlanError(f"the builder ended well and left no {job.plan}")
    return found


def _follow(lines: Iterable[str], progress: Progress) -> str | None:
    """Hands the child's progress on; the problem that it told of, if any."""
    problem = None
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:
            continue  # it was killed in the middle of a line
        if "problem" in told:
            problem = str(told["problem"])
        else:
            progress(told["share"], told["step"])
    return problem


def _epitaph(status: int, last_words: str) -> str:
    """Why a child that said nothing ended."""
    if status < 0:
        with contextlib.suppress(ValueError):
            status_text = signal.Signals(-status).name
            return f"the TensorRT builder was ended by {status_text}; its last words: {last_words}"
    return f"the TensorRT builder ended with status {status}: {last_words}"


def main() -> None:
    """The child: reads a job, builds, tells of its progress."""
    # What TensorRT itself prints goes to stderr; the channel is ours alone.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        job = BuildJob.model_validate_json(sys.argv[1])
        trt = load_tensorrt(job.module)
        if job.module == "tensorrt":
            from export.runtime.cuda import Cuda

            Cuda(job.gpu_index).use()
        _build(trt, job, lambda share, step: _tell(channel, share=share, step=step))
    except (PlanError, RuntimeUnavailableError, ValidationError, OSError) as error:
        _tell(channel, problem=str(error))


def _tell(channel: IO[str], **message: object) -> None:
    channel.write(json.dumps(message) + "\n")


def _build(trt: ModuleType, job: BuildJob, progress: Progress) -> None:
    """Builds under the plan's lock and writes plan and facts."""
    started = time.monotonic()
    job.folder.mkdir(parents=True, exist_ok=True)
    with locked(job.plan):
        if find_built(job):
            return  # another builder was first
        log = log_of(trt)
        builder = made(trt.Builder, log, log)
        network = parse(trt, builder, job.graph, log)
        shape = structure(trt, network)
        old = fitting_source(job.refit_from, job.key, shape, job.level)
        content = _refitted(trt, old, job, log, progress) if old else None
        if content is None:
            old = None
            content = compile_network(trt, builder, network, job, log, progress)
        text, inspected = _inspect(trt, job, content, log)
        if inspected and (warning := missing_bits(job.key.precision, inspected.products)):
            log.warnings.append(warning)
        facts = PlanFacts(
            key=job.key,
            graph_sha256=job.graph_sha256,
            plan=FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content)),
            created=datetime.now(UTC),
            seconds=round(time.monotonic() - started, 2),
            refitted=old is not None,
            refittable=job.refittable or old is not None,
            level=old.facts.level if old else job.level,
            engine=inspected.layers if inspected else None,
            products=inspected.products if inspected else None,
            structure=shape,
            network=layer_types(network),
            warnings=tuple(log.warnings),
        )
        _write(job, content, facts, text)


def _write(job: BuildJob, content: bytes, facts: PlanFacts, text: str) -> None:
    """Puts a plan, with all that is told of it, in the place of the one that was there."""
    facts_file, layers = job.plan.with_suffix(".json"), layers_file(job.plan)
    for file in (facts_file, layers):
        file.unlink(missing_ok=True)
    write_whole(job.plan, content)
    if text:
        write_whole(layers, text.encode(errors="backslashreplace"))
    write_whole(facts_file, (facts.model_dump_json(indent=2) + "\n").encode())


def _refitted(
    trt: ModuleType, old: Plan, job: BuildJob, log: Any, progress: Progress
) -> bytes | None:
    """An earlier plan with the weights of this graph; None if they cannot be put into it."""
    progress(0.0, f"refitting {old.path.name}")
    try:
        return refit(trt, old, job.graph, log)
    except (RuntimeError, TypeError) as error:  # the bindings' own, too
        log.errors.clear()  # of a build that fails after it they would explain nothing
        log.warnings.append(f"not refitted but built: {error}")
        return None


def parse(trt: ModuleType, builder: Any, graph: Path, log: Any) -> Any:
    """The network of an ONNX file, strongly typed; checked to be ours and to have no FP16 norm.

    Raises:
        PlanError: lists every node that the parser refuses.
    """
    network = made(
        builder.create_network, log, 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = "; ".join(
            f"{error.node_name() or 'the graph'} ({error.node_operator()}): "
            f"{' '.join(error.desc().split())}"
            for error in errors
        )
        raise PlanError(f"TensorRT cannot parse {graph.name}: {told or log.why()}")
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    if (
        network.num_inputs != 1
        or network.get_input(0).name != INPUT
        or not set(OUTPUTS) <= set(outputs)
    ):
        raise PlanError(f"{graph.name} is no graph of ours: its outputs are {outputs}")
    half_norms = any(
        layer.type == trt.LayerType.NORMALIZATION and layer.get_input(0).dtype == trt.DataType.HALF
        for layer in _layers(network)
    )
    if half_norms or log.half_norms:
        raise PlanError(_HALF_NORMS)
    return network


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def structure(trt: ModuleType, network: Any) -> str:
    """Hash of a network's layers, operations, types and shapes, without its weights: plans of
    networks that share it may be refitted to each other's weights."""
    lines = []
    for layer in _layers(network):
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        shapes = [(tensor.dtype.name, tuple(tensor.shape)) for tensor in outputs]
        kind = layer.type.name
        if kind in _OPERATIONS:  # the binding's own way to a layer's particulars
            layer.__class__ = getattr(trt, _OPERATIONS[kind])
            kind += f" {layer.op.name}"
        lines.append(f"{kind} {layer.name} {shapes}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def layer_types(network: Any) -> dict[str, dict[str, int]]:
    """How many layers of each kind give each type, such as `MATRIX_MULTIPLY: {HALF: 30}`."""
    counted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for layer in _layers(network):
        kind, given = layer.type.name, layer.get_output(0).dtype.name
        if kind not in _PLUMBING and given not in _COUNTING:
            counted[kind][given] += 1
    return {kind: dict(counted[kind]) for kind in sorted(counted)}


def compile_network(
    trt: ModuleType, builder: Any, network: Any, job: BuildJob, log: Any, progress: Progress
) -> bytes:
    """The plan of a network.

    Raises:
        PlanError: a profile is refused, the build fails, or a LayerNorm would compute in FP16.
    """
    timings = job.timings if job.module == "tensorrt" else None  # TensorRT-RTX measures nothing
    config = builder.create_builder_config()
    config.builder_optimization_level = job.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, progress, log)
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    # On by default, and keeps ten bits: float32 is float32, in plans of fewer bits too.
    config.clear_flag(trt.BuilderFlag.TF32)
    if job.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    clip = tuple(network.get_input(0).shape)[1:]
    for least, best, largest in profiles(job.key.batches):
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, (least, *clip), (best, *clip), (largest, *clip))
        if config.add_optimization_profile(profile) == -1:  # set_shape itself tells nothing
            raise PlanError(f"TensorRT refuses batches of {least} to {largest}: {log.why()}")
    if timings is not None:
        use_timings(config, () if job.rebuild else (timings, *job.earlier_timings), log)
    content = builder.build_serialized_network(network, config)
    if log.half_norms:
        raise PlanError(_HALF_NORMS)
    if content is None:
        raise PlanError(f"TensorRT could not build {job.graph.name}: {log.why()}")
    plan = bytes(content)
    if not plan or len(plan) != content.nbytes:
        raise PlanError(f"TensorRT gave {len(plan)} of the {content.nbytes} bytes of its plan")
    if timings is not None:
        keep_timings(config, timings, log)
    return plan


def _monitor(trt: ModuleType, progress: Progress, log: Any) -> Any:
    """Phases nest; the share that is done counts each phase as one step of the one it is in."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc] # imported at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}
            self.told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, 0, max(1, num_steps))
            self.tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, _, steps = self.phases.get(phase_name, (None, 0, 1))
            self.phases[phase_name] = (parent, step + 1, steps)
            # False stops the build: nobody listens any more, or the plan will not be used.
            return self.tell(phase_name) and not log.half_norms

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def share(self, phase: str | None) -> float:
            inside = [name for name, (parent, _, _) in self.phases.items() if parent == phase]
            return max((self.of(name) for name in inside), default=0.0)

        def of(self, phase: str) -> float:
            _, done, steps = self.phases[phase]
            return min(1.0, (done + self.share(phase)) / steps)

        def tell(self, phase: str) -> bool:
            share = max(self.told, self.share(None))
            if share > self.told + 0.005 or not self.told:
                self.told = share
                try:
                    progress(round(share, 3), phase)
                except OSError:
                    return False
            return True

    return Monitor()


def _inspect(trt: ModuleType, job: BuildJob, plan: bytes, log: Any) -> tuple[str, Inspected | None]:
    """What the engine's inspector says, and what that is.

    None with TensorRT-RTX, which builds on machines that cannot load an engine, and where the
    answer cannot be read, which is a warning: the plan is as good without.

    Raises:
        PlanError: TensorRT cannot load what it has built.
    """
    if job.module != "tensorrt":
        return "", None
    runtime = made(trt.Runtime, log, log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanError(f"TensorRT cannot load the plan that it has just built: {log.why()}")
    inspector = engine.create_engine_inspector()
    text = ""
    try:
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return text, read_layers(text)
    except ValueError as error:
        log.warnings.append(f"what the engine inspector says cannot be read: {error}")
        return text, None


if __name__ == "__main__":
    main()
