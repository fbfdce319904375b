"""The TensorRT engine builder: an ONNX graph to a plan for one GPU, in a process of its own.

    python -m export.tensorrt JOB      what `build_plan` starts; tells its progress in JSON lines

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

from export.manifest import FileEntry
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import (
    FOLDER,
    Plan,
    PlanError,
    PlanFacts,
    PlanKey,
    find_plan,
    layers_file,
    locked,
    plans_in,
    profiles,
    write_whole,
)
from export.runtime.tensorrt import INPUT, OUTPUTS, Wanted, load_tensorrt, log_of

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
    timing_cache: Path | None = Field(None, description="file of earlier builds' measurements")
    refittable: bool = False
    refit_from: Path | None = Field(
        None, description="facts of a refittable plan of the same network with other weights"
    )
    module: str = "tensorrt"

    @classmethod
    def of(cls, wanted: Wanted, **options: Any) -> BuildJob:
        """The job of building what is wanted; `options` are the fields that are not in it."""
        return cls(**wanted._asdict(), **options)

    @property
    def plan(self) -> Path:
        return self.folder / f"{self.key.stem}.plan"


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
    if found := find_plan(job.folder, job.key, job.graph_sha256):
        return found
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "export.tensorrt", job.model_dump_json()]
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
    if child.returncode:
        raise PlanError(_epitaph(child.returncode, last_words))
    found = find_plan(job.folder, job.key, job.graph_sha256)
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
        if find_plan(job.folder, job.key, job.graph_sha256):
            return  # another builder was first
        job.plan.with_suffix(".json").unlink(missing_ok=True)  # of another graph
        log = log_of(trt)
        builder = _made(trt.Builder, log, log)
        network = parse(trt, builder, job.graph, log)
        shape = structure(trt, network)
        old = _refit_source(job, shape)
        if old is not None:
            progress(0.0, f"refitting {old.path.name}")
            content = refit(trt, old, job.graph, log)
        else:
            content = compile_network(trt, builder, network, job, log, progress)
        write_whole(job.plan, content)
        written = PlanFacts(
            key=job.key,
            graph_sha256=job.graph_sha256,
            plan=FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content)),
            created=datetime.now(UTC),
            seconds=round(time.monotonic() - started, 2),
            refitted=old is not None,
            refittable=job.refittable or old is not None,
            level=job.level,
            engine=_inspect(trt, job, content, log),
            structure=shape,
            network=layer_types(network),
            warnings=tuple(log.warnings),
        )
        text = written.model_dump_json(indent=2) + "\n"
        write_whole(job.plan.with_suffix(".json"), text.encode())


def _made(make: Any, log: Any, *arguments: Any) -> Any:
    """What a TensorRT factory gives; it says that it failed by None or by a TypeError."""
    try:
        made = make(*arguments)
    except (TypeError, RuntimeError) as error:
        raise PlanError(f"TensorRT could not start: {log.why()} ({error})") from error
    if made is None:
        raise PlanError(f"TensorRT could not start: {log.why()}")
    return made


def parse(trt: ModuleType, builder: Any, graph: Path, log: Any) -> Any:
    """The network of an ONNX file, strongly typed; checked to be ours and to have no FP16 norm.

    Raises:
        PlanError: lists every node that the parser refuses.
    """
    network = _made(
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
    config = builder.create_builder_config()
    config.builder_optimization_level = job.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, progress, log)
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.key.precision == "float32":  # TF32 is on by default and keeps ten bits
        config.clear_flag(trt.BuilderFlag.TF32)
    if job.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    clip = tuple(network.get_input(0).shape)[1:]
    for least, best, largest in profiles(job.key.batches):
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, (least, *clip), (best, *clip), (largest, *clip))
        if config.add_optimization_profile(profile) == -1:  # set_shape itself tells nothing
            raise PlanError(f"TensorRT refuses batches of {least} to {largest}: {log.why()}")
    if job.timing_cache is not None:
        _use_timing_cache(config, job.timing_cache, log)
    content = builder.build_serialized_network(network, config)
    if log.half_norms:
        raise PlanError(_HALF_NORMS)
    if content is None:
        raise PlanError(f"TensorRT could not build {job.graph.name}: {log.why()}")
    plan = bytes(content)
    if not plan or len(plan) != content.nbytes:
        raise PlanError(f"TensorRT gave {len(plan)} of the {content.nbytes} bytes of its plan")
    if job.timing_cache is not None:
        _keep_timing_cache(config, job.timing_cache)
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


def _use_timing_cache(config: Any, path: Path, log: Any) -> None:
    """Starts from what earlier builds measured; a cache that does not fit is begun anew."""
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        log.warnings.append(f"{path.name} is of another GPU or TensorRT, or damaged: begun anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timing_cache(config: Any, path: Path) -> None:
    """Adds what this build measured to the file, beside what others did meanwhile."""
    cache = config.get_timing_cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        others = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
        if others is not None:
            cache.combine(others, True)
        write_whole(path, bytes(cache.serialize()))


def _refit_source(job: BuildJob, wanted: str) -> Plan | None:
    """The refittable plan that the job names, if its network is this one with other weights."""
    if job.refit_from is None:
        return None
    with contextlib.suppress(ValidationError, OSError):
        facts = PlanFacts.model_validate_json(job.refit_from.read_bytes())
        if facts.refittable and facts.key == job.key and facts.structure == wanted:
            return Plan(job.refit_from.with_suffix(".plan"), facts)
    return None


def refit_source(folder: Path, key: PlanKey) -> Path | None:
    """Facts of the newest refittable plan of that key among the other versions' plans.

    Args:
        folder: of this version's plans; the others' lie as theirs do, `VERSION/...` beside it.
    """
    inside = folder.name == FOLDER
    version = folder.parent if inside else folder
    others = (
        plan
        for other in version.parent.glob("*")
        if other != version
        for plan in plans_in(other / FOLDER if inside else other)
        if plan.facts.refittable and plan.facts.key == key
    )
    newest = max(others, key=lambda plan: plan.facts.created, default=None)
    return newest.path.with_suffix(".json") if newest else None


def refit(trt: ModuleType, plan: Plan, graph: Path, log: Any) -> bytes:
    """The plan with the weights of another graph of the same structure; seconds, not minutes.

    Raises:
        PlanError: the weights do not fit or the plan cannot be loaded here.
    """
    runtime = _made(trt.Runtime, log, log)
    engine = runtime.deserialize_cuda_engine(plan.path.read_bytes())
    if engine is None:
        raise PlanError(f"TensorRT cannot load {plan.path.name} to refit it: {log.why()}")
    refitter = _made(trt.Refitter, log, engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
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


def _inspect(
    trt: ModuleType, job: BuildJob, plan: bytes, log: Any
) -> dict[str, dict[str, int]] | None:
    """Layers of the engine; the inspector's whole answer goes beside the plan.

    None where the engine cannot be loaded: TensorRT-RTX builds on machines that cannot run it.
    """
    if job.module != "tensorrt":
        return None
    engine = _made(trt.Runtime, log, log).deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanError(f"TensorRT cannot load the plan that it has just built: {log.why()}")
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    write_whole(layers_file(job.plan), text.encode())
    return engine_layers(text)


def engine_layers(inspected: str) -> dict[str, dict[str, int]]:
    """How many layers of each kind give each type, by what the engine's inspector says in JSON."""
    counted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for told in json.loads(inspected).get("Layers", []):
        kind, given = "unnamed", "unknown"  # a plan that tells names alone has strings here
        if isinstance(told, dict):
            kind = str(told.get("LayerType", kind))
            for output in told.get("Outputs", [])[:1]:
                # TensorRT 10 has both in one, such as `Row major linear FP16 format`.
                given = str(output.get("DataType") or output.get("Format/Datatype") or given)
        counted[kind][given] += 1
    return {kind: dict(counted[kind]) for kind in sorted(counted)}


if __name__ == "__main__":
    main()
