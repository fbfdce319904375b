"""From new data to a served model: fine-tune, export, verify, compare, publish, activate.

    WORK/ID/log.jsonl, training.json   the training, see `model/training/loop.py`
    WORK/ID/report.html                the same for people, with what the new version says of the
                                       hold-out, beside the active one
    WORK/ID/checkpoints/, candidate/   removed when the refresh is done
    WORK/ID/activate                   there from before publishing until the version is active

Killed anywhere, the same call goes on: training from its last checkpoint, the export from the
trained weights. What a refresh was made from is in the manifest of what it published, so that
nothing is published twice. Needs torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from export.bundle.bundle import Bundle, BundleError, BundleStore
from export.bundle.manifest import GPU_KINDS, WEIGHTS
from export.graph.build import Precision, precisions_of
from export.pipeline import export_bundle
from export.refresh.comparison import Comparison, Decision, Rule, compare, decide
from export.runtime import Device, load_runtime
from export.runtime.interface import Precision as ServedPrecision
from export.verification.artefacts import open_graph
from model.checkpoints import Checkpoint, load_checkpoint
from model.data.lists import Sample, VideoList
from model.evaluation.calibration import calibrate
from model.evaluation.metrics import Predictions, Protocol, predict
from model.files import LockTakenError, lock_file
from model.reports.training_report import PAGE, Evaluated, write_report
from model.training.config import Job, Machine
from model.training.distributed.process_group import ALONE, started_together
from model.training.errors import DataError, TrainingError
from model.training.event_log import LOG, read_log
from model.training.initialisation import grown
from model.training.loop import train
from model.training.recipe import PRESETS, Recipe
from model.training.trainer import CHECKPOINTS

WORK = ".refresh"  # in the folder of the name; a store takes it for no version
_CANDIDATE, _ACTIVATE = "candidate", "activate"
_ID_LENGTH = 16


class RefreshError(TrainingError):
    """A refresh that cannot be begun as asked; the message says what to give instead."""


class HoldOut(NamedTuple):
    """Which part of the data both models are judged on: see `VideoList.split`."""

    share: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """What is made of what.

    Attributes:
        parent: whose weights are trained on; its classes come first, in their order.
        data: its classes are by name; those that the parent lacks are added to the head.
        validation: what both models are judged on, instead of a part of `data`.
        hold_out: by default the parent's, so that no video which it was judged on is trained on.
        precisions: of the bundle, besides float32 and those that the parent has.
        served: the precision in which both models are compared: that of the service.
        activate: False only publishes.
        work: where the refresh keeps its state; by default beside the versions.
    """

    store: BundleStore
    parent: Bundle
    data: VideoList
    validation: VideoList | None = None
    hold_out: HoldOut | None = None
    recipe: Recipe = PRESETS["refresh"]
    rule: Rule = Rule()  # noqa: RUF009 (immutable)
    precisions: frozenset[Precision] = frozenset()
    served: ServedPrecision = "float32"
    activate: bool = True
    work: Path | None = None


@dataclasses.dataclass(frozen=True)
class Listeners:
    """What is told on the way: each stage as it begins; `training` are keywords of `loop.train`."""

    stage: Callable[[str], None] = lambda text: None
    training: Mapping[str, Callable[..., None]] = dataclasses.field(default_factory=dict)


class Refreshed(NamedTuple):
    """What came of it.

    `accepted` says whether the rule let the version serve, `activated` whether it does now,
    `again` that it was published by an earlier call; `reason` is a sentence.
    """

    bundle: Bundle
    accepted: bool
    activated: bool
    again: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A task with everything settled, and `inputs`: what decides the weights and the bundle."""

    task: Task
    labels: tuple[str, ...]
    training: VideoList
    held_out: VideoList
    hold_out: HoldOut | None
    precisions: frozenset[Precision]

    @functools.cached_property
    def inputs(self) -> str:
        """SHA-256 of all that a refresh is made from, but the parent."""
        content = {
            "recipe": self.task.recipe.to_dict(),
            "training": self.training.fingerprint(),
            "held_out": self.held_out.fingerprint(),
            "precisions": sorted(self.precisions),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def work(self) -> Path:
        """Of all refreshes of the name."""
        return self.task.work or self.task.parent.path.parent / WORK

    @property
    def folder(self) -> Path:
        """Of this refresh, and no other."""
        return self.folder_of(self.task.parent.manifest.weights_sha256)

    def folder_of(self, weights_sha256: str) -> Path:
        """Of the refresh from the same inputs and these weights."""
        both = f"{self.inputs} {weights_sha256}"
        return self.work / hashlib.sha256(both.encode()).hexdigest()[:_ID_LENGTH]


def refresh(
    task: Task,
    machine: Machine = Machine(),  # noqa: B008 (immutable)
    device: Device = "cpu",
    listeners: Listeners = Listeners(),
) -> Refreshed:
    """Makes the next version of `task.parent` from its weights and new data.

    It is compared, as it would be served, with the active version on the hold-out, is published
    with both models' metrics and the decision in its manifest, and activated if the rule allows. A
    call with what an earlier one was made from publishes nothing; if that one was killed
    before it could activate its version, this one does.

    Args:
        device: that both bundles are compared on; `machine.device` is the training's.

    Raises:
        RefreshError: the hold-out of the parent is not known any more, or torchrun has started
            several processes.
        TrainingError: the data cannot be used, or training failed or was stopped.
        BundleError: the parent is damaged, or the store cannot be written.
        ExportError: the export is not what the network is; nothing is published.
    """
    if started_together() > 1:
        raise RefreshError(
            "a refresh is one process: train with several by `timesformer train --from BUNDLE/"
            f"{WEIGHTS}`, and export what they give"
        )
    task.parent.verify()
    plan = _plan(task)
    with _alone(plan.work):
        made = _made_before(plan)
        if made is not None:
            return _finish(plan, made, again=True)
        plan.folder.mkdir(exist_ok=True)
        made = _make(plan, machine, device, listeners)
        return _finish(plan, made, again=False)


# ---- what is asked for --------------------------------------------------------------------------


def _plan(task: Task) -> _Plan:
    if task.recipe.optimisation.patience:
        raise RefreshError("a refresh has no early stop, since its hold-out judges: no patience")
    known = task.parent.manifest.labels
    used = {task.data.labels[sample.label] for sample in task.data.samples}
    labels = (*known, *sorted(used - set(known)))
    data = _in_classes(task.data, labels)
    hold_out = None
    if task.validation is not None:
        held_out = _in_classes(task.validation, labels)
        training = _without(data, held_out)
    else:
        hold_out = task.hold_out or _parents_hold_out(task.parent)
        training, held_out = data.split(*hold_out)
    # A service may be told to want what the parent has.
    precisions = task.precisions | precisions_of(task.parent)
    return _Plan(task, labels, training, held_out, hold_out, precisions)


def _in_classes(videos: VideoList, labels: tuple[str, ...]) -> VideoList:
    """The same videos with their classes' indices in `labels`.

    Raises:
        DataError: a class is not there.
    """
    index = {label: number for number, label in enumerate(labels)}
    samples = []
    for sample in videos.samples:
        name = videos.labels[sample.label]
        if name not in index:
            raise DataError(
                f"{sample.path} is of class {name!r}, which neither the parent nor the data has: "
                "take it out of the validation list, or add videos of it to the data"
            )
        samples.append(sample._replace(label=index[name]))
    return VideoList(tuple(samples), labels)


def _without(videos: VideoList, held_out: VideoList) -> VideoList:
    """The videos that are not, as files, among the held-out ones."""

    def place(sample: Sample) -> Path:
        return Path(sample.path).absolute()

    kept_out = {place(sample) for sample in held_out.samples}
    samples = tuple(sample for sample in videos.samples if place(sample) not in kept_out)
    if not samples:
        raise DataError("every video of the data is in the validation list: nothing is left")
    return dataclasses.replace(videos, samples=samples)


def record(bundle: Bundle) -> Mapping[str, Any]:
    """What the manifest says of the refresh that made a bundle; empty if none did."""
    kept: Mapping[str, Any] = (bundle.manifest.training or {}).get("refresh") or {}
    return kept


def _parents_hold_out(parent: Bundle) -> HoldOut:
    made = record(parent)
    if not made:
        return HoldOut()
    kept = made["hold_out"]
    if kept["share"] is None:
        raise RefreshError(
            f"{parent.name} version {parent.version} was judged on a validation list of its own: "
            "give --validation again, or --hold-out to take another part of the data"
        )
    return HoldOut(kept["share"], kept["seed"])


# ---- what was done before -----------------------------------------------------------------------


def _made_before(plan: _Plan) -> Bundle | None:
    """The version that was made from the same inputs and parent; or the parent, if it was made
    from these inputs: there is nothing new to learn.
    """
    store, parent = plan.task.store, plan.task.parent
    for version in reversed(store.versions(parent.name)):
        try:
            bundle = store.open(parent.name, version)
        except BundleError:
            continue  # damaged, and therefore not what we look for
        made = record(bundle)
        if made.get("inputs") != plan.inputs:
            continue
        weights = parent.manifest.weights_sha256
        if version == parent.version or made["parent"]["weights_sha256"] == weights:
            return bundle
    return None


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Locks the work folder for this process."""
    with ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(work / ".lock", wait=False))
        except LockTakenError:
            raise RefreshError(f"another refresh works in {work}; wait for it") from None
        except OSError as error:
            raise RefreshError(f"cannot write into {work}: {error.strerror}; give --out") from error
        yield


# ---- the work -----------------------------------------------------------------------------------


def _make(plan: _Plan, machine: Machine, device: Device, listeners: Listeners) -> Bundle:
    """Trains, exports, compares and publishes."""
    task = plan.task
    listeners.stage(
        f"training on {len(plan.training.samples)} videos from {task.parent.name} "
        f"version {task.parent.version}"
    )
    report = _train(plan, machine, listeners)
    candidate = _export(plan, listeners)
    active = _active(task)
    found = _predictions(plan, candidate, active, device, machine.workers, listeners)
    calibration = calibrate(found[0])
    parents = task.parent.manifest.temperature
    temperature = calibration.temperature if calibration is not None else parents
    comparison = compare(*found, temperatures=(temperature, active.manifest.temperature))
    decision = decide(comparison, task.rule)
    if decision.accepted and task.activate:
        (plan.folder / _ACTIVATE).touch()
    listeners.stage("publishing")
    training = {
        **report,
        "metrics": comparison.everything.new.to_dict(),
        "temperature": temperature,
        "protocol": Protocol()._asdict(),
        "validation_videos": len(plan.held_out.samples),
        "refresh": _record(plan, active, comparison, decision),
    }
    seen = Evaluated(found[0], candidate.config.preprocessing, temperature, calibration)
    _write_report(plan, training, seen, machine.workers)
    changes = {"parent": task.parent.version, "temperature": temperature, "training": training}
    return _publish(task, candidate, changes)


def _train(plan: _Plan, machine: Machine, listeners: Listeners) -> dict[str, Any]:
    """Trains the parent's own weights on; at once, if they were before."""
    parent = plan.task.parent
    loaded = load_checkpoint(parent.file(WEIGHTS))
    checkpoint: Checkpoint = dataclasses.replace(loaded, labels=parent.manifest.labels)
    # The hold-out decides once, at the end: what is looked at after each epoch is soon chosen by.
    job = Job(plan.task.recipe, plan.training, None, plan.folder)
    model = grown(checkpoint, plan.labels).build()
    return train(model, job, machine, world=ALONE, **listeners.training)


def _export(plan: _Plan, listeners: Listeners) -> Bundle:
    """The verified bundle of the trained weights, in a store of its own; an earlier call's, if that
    got so far.
    """
    name, store = plan.task.parent.name, BundleStore(plan.folder / _CANDIDATE)
    for version in reversed(store.versions(name)):
        try:
            candidate = store.open(name, version)
            candidate.verify()
        except BundleError:
            continue
        return candidate
    return export_bundle(
        load_checkpoint(plan.folder / WEIGHTS),
        name,
        store,
        labels=plan.labels,
        precisions=plan.precisions,
        report=listeners.stage,
    )


def _active(task: Task) -> Bundle:
    """The version that serves; the parent, if none does."""
    version = task.store.active(task.parent.name)
    return task.store.open(task.parent.name, version or task.parent.version)


def _predictions(
    plan: _Plan,
    candidate: Bundle,
    active: Bundle,
    device: Device,
    processes: int,
    listeners: Listeners,
) -> list[Predictions]:
    """What the new and the active version say of the hold-out."""
    found = []
    for bundle, what in ((candidate, "the new version"), (active, f"version {active.version}")):
        listeners.stage(f"evaluating {what} on {len(plan.held_out.samples)} videos")
        found.append(_predict(bundle, plan, device, processes))
    return found


def _predict(bundle: Bundle, plan: _Plan, device: Device, processes: int) -> Predictions:
    """What the bundle says of the hold-out, by the engine that serves it."""
    served = plan.task.served
    if served in GPU_KINDS:
        runtime = open_graph(bundle, served, cuda=False)
    else:
        runtime = load_runtime(bundle, device, precision=served)
    try:
        found = predict(
            plan.held_out,
            bundle.config.preprocessing,
            lambda frames: runtime.run(frames).logits,
            processes=processes,
        )
    finally:
        runtime.close()
    return dataclasses.replace(found, labels=bundle.manifest.labels)


def _write_report(
    plan: _Plan, training: Mapping[str, Any], seen: Evaluated, processes: int
) -> None:
    """The page stays in the work folder: pictures and paths of videos are not published."""
    parent = plan.task.parent
    title = f"Refresh of {parent.name} version {parent.version}"
    events = read_log(plan.folder / LOG)
    try:
        write_report(plan.folder / PAGE, title, training, events, seen, processes=processes)
    except OSError as error:
        raise RefreshError(f"cannot write into {plan.folder}: {error.strerror}") from error


def _record(
    plan: _Plan, active: Bundle, comparison: Comparison, decision: Decision
) -> dict[str, Any]:
    """For the manifest; paths of videos are not in it, since it is published with the model."""
    parent, hold_out = plan.task.parent, plan.hold_out
    return {
        "inputs": plan.inputs,
        "parent": {"version": parent.version, "weights_sha256": parent.manifest.weights_sha256},
        "classes_added": list(plan.labels[len(parent.manifest.labels) :]),
        "hold_out": {
            "share": hold_out.share if hold_out else None,
            "seed": hold_out.seed if hold_out else None,
            "videos": len(plan.held_out.samples),
            "fingerprint": plan.held_out.fingerprint(),
        },
        "compared_with": active.version,
        "precision": plan.task.served,
        "comparison": comparison.to_dict(),
        "rule": dataclasses.asdict(plan.task.rule),
        "accepted": decision.accepted,
        "reason": decision.reason,
    }


# ---- publishing and activating ------------------------------------------------------------------


def _publish(task: Task, candidate: Bundle, changes: Mapping[str, Any]) -> Bundle:
    """Copies the candidate into the store; `changes` of its manifest are what is known by now."""
    with task.store.staging(task.parent.name) as staging:
        for name in candidate.manifest.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(candidate.path / name, staging / name)
        return task.store.publish(staging, candidate.manifest.model_copy(update=dict(changes)))


def _finish(plan: _Plan, made: Bundle, *, again: bool) -> Refreshed:
    """Activates what is to be activated and removes what only the work needed.

    An earlier call's version is activated only where that call was killed on the way to it: one
    that was rolled back since stays so.
    """
    task, kept = plan.task, record(made)
    folder = plan.folder_of(kept["parent"]["weights_sha256"])
    accepted, reason = kept["accepted"], kept["reason"]
    if task.activate and (folder / _ACTIVATE).exists():
        now = task.store.active(made.name)
        if now in (None, kept["compared_with"]):
            task.store.activate(made.name, made.version)
        elif now != made.version:
            accepted = False
            reason = (
                f"it was compared with version {kept['compared_with']}, "
                f"but version {now} was activated meanwhile"
            )
    # Where others were interrupted is older than the version that was just made.
    for each in [folder] if again else plan.work.glob("[0-9a-f]" * _ID_LENGTH):
        _tidy(each)
    activated = task.store.active(made.name) == made.version
    return Refreshed(made, accepted, activated, again, reason)


def _tidy(folder: Path) -> None:
    """Leaves the log and the report."""
    for name in (_ACTIVATE, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, _CANDIDATE):
        shutil.rmtree(folder / name, ignore_errors=True)
