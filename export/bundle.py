"""The bundle: the unit that is exported, verified, published, served and rolled back.

A folder `STORE/NAME/VERSION/`, immutable once published, with a `manifest.json` that says what is
in it. Versions count up from 1. The active version of a name is one small file, replaced
atomically (`export/pointers.py`). Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from export.pointers import ACTIVE as ACTIVE
from export.pointers import (
    VERSION,
    read_candidate,
    read_history,
    sync,
    write_candidate,
    write_history,
    writing,
)
from export.pointers import BundleError as BundleError
from export.pointers import Candidate as Candidate
from model.config import ConfigError, ModelConfig

MANIFEST = "manifest.json"
LABELS = "labels.txt"
WEIGHTS = "weights.safetensors"
ONNX_FLOAT32 = "model.onnx"
ONNX_INT8 = "model.int8.onnx"
ONNX_FP16 = "model.fp16.onnx"
ONNX_INT8_QDQ = "model.int8-qdq.onnx"
ONNX_FP8 = "model.fp8.onnx"
GRAPHS = {
    "float32": ONNX_FLOAT32,
    "fp16": ONNX_FP16,
    "int8": ONNX_INT8,
    "int8-qdq": ONNX_INT8_QDQ,
    "fp8": ONNX_FP8,
}
"""The file of each kind of graph. INT8 is two: rounded at run time for CPUs, by calibrated ranges
for TensorRT."""
GPU_KINDS = frozenset({"fp16", "int8-qdq", "fp8"})
"""Graphs that no CPU computes as they say; `export.emulation` shows there what a GPU does."""
REPORT = "report.html"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STAGING = ".staging-"


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is not a path inside the bundle")
    return name


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Model):
    """An input or output of the graph; -1 in `shape` is the batch."""

    name: str
    dtype: Literal["uint8", "float32"]
    shape: tuple[int, ...]


class FileEntry(_Model):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0, description="bytes")


class Parity(_Model):
    """How one artefact's answers compare with the float32 network's on the same clips."""

    clips: int = Field(ge=1)
    max_difference: float = Field(description="largest absolute difference of two logits")
    mean_difference: float
    embedding_max_difference: float
    centred_cosine: float | None = Field(
        None, description="of the logits, each clip's mean taken away; the worst clip's"
    )
    embedding_cosine: float | None = Field(None, description="the same of the embedding")
    softmax_divergence: float | None = Field(
        None, description="Kullback-Leibler divergence of the scores, in nats; the worst clip's"
    )
    top1_agreement: float = Field(ge=0, le=1)
    top5_agreement: float | None = Field(None, ge=0, le=1)
    low_margin_clips: int | None = Field(
        None, ge=0, description="clips whose best two logits are within noise of each other"
    )
    low_margin_agreement: float | None = Field(
        None, ge=0, le=1, description="top-1 agreement on those; on all others it must be 1"
    )
    limit: float | None = Field(
        description="largest `max_difference` that passes; null if the cosine decides"
    )
    cosine_limit: float | None = Field(None, description="least cosine that passes")
    passed: bool


class Cost(_Model):
    """What a network or graph costs."""

    parameters: int = Field(ge=0)
    multiply_adds: int = Field(ge=0, description="of one view, as the papers of the field count")


class ProductReport(_Model):
    """A matrix product of a graph of lower precision."""

    name: str = Field(description="the module of the network and the operator")
    precision: Literal["float32", "fp16", "int8", "fp8"]
    inputs: tuple[float, float] = Field(
        description="largest magnitude of each factor on the calibration clips"
    )
    output: float = Field(description="the same of the result, before a bias is added")
    error: float | None = Field(
        default=None,
        description="by how much of its length 8 bits put the result off on the calibration clips",
    )
    reason: str | None = Field(None, description="why it is not of the graph's own precision")


class CalibrationReport(_Model):
    """What ranges were measured on, and how those of 8 bits were chosen."""

    source: str = Field(description="name of the folder or list of videos, or `rendered`")
    clips: int = Field(ge=1)
    methods: dict[str, str] = Field(
        default_factory=dict, description="how much of the activations' range each graph covers"
    )
    agreement: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="what decided that: least cosine on calibration clips, by graph and method",
    )


class Choice(_Model):
    """What `auto` takes on a kind of device."""

    order: tuple[str, ...] = Field(min_length=1, description="precisions, the fastest first")
    reason: str
    milliseconds: dict[str, float] | None = Field(
        default=None, description="a clip's, by precision, where they were measured"
    )


class Manifest(_Model):
    """`manifest.json`. Every fact about a bundle that a reader may want without its weights."""

    schema_version: Literal[1] = 1
    name: str
    version: str
    created: datetime
    source: str = Field(description="what the weights were loaded from")
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    labels: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights_sha256: str
    files: dict[Annotated[str, AfterValidator(_relative)], FileEntry]
    software: dict[str, str]
    network_cost: Cost | None = Field(None, description="of the network as it was trained")
    graph_cost: Cost | None = Field(None, description="of the graph, after its exact rewrites")
    verification: dict[str, Parity]
    products: dict[str, tuple[ProductReport, ...]] = Field(
        default_factory=dict, description="of each graph whose precision was chosen by calibration"
    )
    calibration: CalibrationReport | None = None
    fastest: dict[Literal["cpu", "gpu"], Choice] = Field(
        default_factory=dict, description="what `auto` takes, where the export was to find out"
    )
    rejected: dict[str, str] = Field(
        default_factory=dict, description="graphs that `auto` tried and that failed, and why"
    )
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="what logits are divided by to become scores"
    )
    training: dict[str, Any] | None = None
    parent: str | None = None

    @property
    def config(self) -> ModelConfig:
        """The architecture and preprocessing, as one.

        Raises:
            ConfigError: they describe no model.
        """
        return ModelConfig.from_dict({**self.architecture, **self.preprocessing})


class Bundle:
    """One published version, read from its folder.

    Raises:
        BundleError: the folder holds no bundle this version of the program can read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
            self.config = self.manifest.config
        except FileNotFoundError:
            raise BundleError(f"{path} holds no {MANIFEST}: it is not a bundle") from None
        except ValidationError as error:
            raise BundleError(f"{path / MANIFEST} cannot be used: {_problems(error)}") from error
        except (ConfigError, OSError) as error:
            raise BundleError(f"{path / MANIFEST} cannot be used: {error}") from error
        if len(self.manifest.labels) != self.config.num_classes:
            raise BundleError(
                f"{path / MANIFEST} has {len(self.manifest.labels)} labels "
                f"for {self.config.num_classes} classes"
            )

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    def file(self, name: str) -> Path:
        """Path of a file of the bundle.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.name} version {self.version} has no {name}")
        return self.path / name

    def verify(self) -> None:
        """Checks every file against the manifest, and that every artefact passed its parity gate.

        Raises:
            BundleError: names the first file that is missing, changed or failed.
        """
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                raise BundleError(f"{path} is missing: publish the bundle again")
            if path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
                raise BundleError(f"{path} is not the file that was published: its hash is off")
        artefacts = {name for name in self.manifest.files if name.endswith(".onnx")}
        for name in sorted(artefacts):
            parity = self.manifest.verification.get(name)
            if parity is None or not parity.passed:
                raise BundleError(f"{self.path / name} did not pass verification: export it again")
        if not artefacts:
            raise BundleError(f"{self.path} lists no ONNX file: there is nothing to serve")


class BundleStore:
    """A folder of bundles by name and version, and which version of each name is active."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        entries = (entry.name for entry in _entries(self.root))
        return sorted(name for name in entries if _NAME.fullmatch(name) and self.versions(name))

    def versions(self, name: str) -> list[str]:
        """Published versions of a name, oldest first; none if there is no such name."""
        found = _entries(self._folder(name))
        versions = (entry.name for entry in found if VERSION.fullmatch(entry.name))
        return sorted(
            (v for v in versions if (self._folder(name) / v / MANIFEST).is_file()), key=int
        )

    def active(self, name: str) -> str | None:
        """The version that serves, or None when none was ever activated.

        Raises:
            BundleError: the pointer is there and unreadable.
        """
        history = self.history(name)
        return history[0] if history else None

    def open(self, name: str, version: str | None = None) -> Bundle:
        """One version of a name, by default the active one.

        Raises:
            BundleError: there is no such bundle, or it cannot be read.
        """
        version = version or self.active(name)
        if version is None:
            raise BundleError(
                f"{name} has no active version in {self.root}: "
                f"`timesformer bundles activate {name} VERSION --store {self.root}` sets one"
            )
        if version not in self.versions(name):
            known = ", ".join(self.versions(name)) or "none"
            raise BundleError(f"{self.root} has no version {version} of {name}; it has: {known}")
        bundle = Bundle(self._folder(name) / version)
        if (bundle.name, bundle.version) != (name, version):
            raise BundleError(
                f"{bundle.path / MANIFEST} is of {bundle.name} version {bundle.version}: "
                "the folder was moved or copied; publish the bundle under this name instead"
            )
        return bundle

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """An empty folder on the store's disk to write a bundle into; removed at the end.

        It is locked for as long as its process lives, so that folders which a killed export left
        behind are told from those in use, and removed here.

        Raises:
            BundleError: the disk is full or cannot be written to, also inside the block.
        """
        folder = self._folder(name)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with self._lock(name):
                for entry in folder.glob(f"{_STAGING}*"):
                    _remove_if_abandoned(entry)
                path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
                in_use = os.open(path, os.O_RDONLY)
                fcntl.flock(in_use, fcntl.LOCK_EX)
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
                os.close(in_use)

    def publish(self, staging: Path, manifest: Manifest) -> Bundle:
        """Turns a staging folder into the next version of `manifest.name`.

        `version`, `created` and `files` of the manifest are filled in here. What is on disk is
        synced before the rename, so that a power cut leaves the whole version or none.

        Raises:
            BundleError: an artefact in it did not pass verification, or the disk is full; the store
                is as it was.
        """
        folder = self._folder(manifest.name)
        files = _hashes(staging)
        with writing(folder), self._lock(manifest.name):
            version = self._next_version(manifest.name)
            manifest = manifest.model_copy(
                update={"version": version, "created": datetime.now(UTC), "files": files}
            )
            (staging / MANIFEST).write_text(
                manifest.model_dump_json(indent=2) + "\n", encoding="utf-8"
            )
            Bundle(staging).verify()
            _settle(staging, folder / version)
        return Bundle(folder / version)

    def activate(self, name: str, version: str) -> Bundle:
        """Makes a version the active one, after checking its hashes and verification.

        Raises:
            BundleError: it is not there, damaged, or failed verification; nothing has changed.
        """
        bundle = self.open(name, version)
        bundle.verify()
        with self._lock(name):
            history = self.history(name)
            if history[:1] != [version]:
                write_history(self._folder(name), [version, *history])
            with contextlib.suppress(BundleError):  # a damaged one is for its own command to tell
                candidate = self.candidate(name)
                if candidate is not None and candidate.version == version:
                    write_candidate(self._folder(name), None)
        return bundle

    def rollback(self, name: str) -> Bundle:
        """Goes back to the version that was active before; the way forward is `activate`.

        Raises:
            BundleError: there is none, or it is damaged; nothing has changed.
        """
        with self._lock(name):
            history = self.history(name)
            if len(history) < 2:
                raise BundleError(f"{name} has no earlier active version to roll back to")
            bundle = self.open(name, history[1])
            bundle.verify()
            write_history(self._folder(name), history[1:])
        return bundle

    def adopt(self, staging: Path) -> Bundle:
        """Takes a version that was published elsewhere, as it is and under its own number.

        Raises:
            BundleError: it is damaged or failed verification; the store is as it was.
        """
        bundle = Bundle(staging)
        folder = self._folder(bundle.name)
        if not VERSION.fullmatch(bundle.version):
            raise BundleError(f"{bundle.version!r} of {bundle.name} is no version")
        bundle.verify()
        with writing(folder), self._lock(bundle.name):
            if bundle.version not in self.versions(bundle.name):
                _settle(staging, folder / bundle.version)
        return Bundle(folder / bundle.version)

    def follow(self, name: str, history: list[str], candidate: Candidate | None) -> None:
        """Points to what another store points to; the versions are here already.

        Raises:
            BundleError: it cannot be written.
        """
        with self._lock(name):
            if history and self.history(name) != history:
                write_history(self._folder(name), history)
            if self.candidate(name) != candidate:
                write_candidate(self._folder(name), candidate)

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise BundleError(
                f"{name!r} is no bundle name: use up to 64 letters, digits, '.', '_' and '-'"
            )
        return self.root / name

    def _next_version(self, name: str) -> str:
        """Past every number that was ever taken, as far as the folder and the pointer remember: a
        version that was deleted must not come back as another bundle."""
        taken = [entry.name for entry in _entries(self._folder(name))] + self.history(name)
        return str(
            max((int(number) for number in taken if VERSION.fullmatch(number)), default=0) + 1
        )

    def history(self, name: str) -> list[str]:
        """Versions that were active, the present one first; as many as the pointer remembers.

        Raises:
            BundleError: the pointer is there and unreadable.
        """
        return read_history(self._folder(name))

    def candidate(self, name: str) -> Candidate | None:
        """The version that is tried beside the active one, if one is.

        Raises:
            BundleError: the file that says so is there and unreadable.
        """
        return read_candidate(self._folder(name))

    def try_candidate(self, name: str, candidate: Candidate | None) -> None:
        """Lets running services try a version beside the active one, or none any more.

        Raises:
            BundleError: the version is not there, damaged, or the active one; nothing has changed.
        """
        if candidate is not None:
            self.open(name, candidate.version).verify()
        with self._lock(name):
            if candidate is not None and candidate.version == self.active(name):
                raise BundleError(f"version {candidate.version} of {name} is the active one")
            write_candidate(self._folder(name), candidate)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One writer per name at a time, across processes; the kernel frees it if one dies.

        The lock is on the folder of the name, which therefore is never removed here.
        """
        try:
            descriptor = os.open(self._folder(name), os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(f"{self.root} has no bundle named {name}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"cannot read {folder}: {error.strerror}") from error


def _settle(staging: Path, version: Path) -> None:
    """Makes a staging folder a version, whole or not at all."""
    for path in (*staging.rglob("*"), staging):
        sync(path)
    staging.chmod(0o755)  # mkdtemp makes it private; other users serve it
    staging.rename(version)
    sync(version.parent)


def _remove_if_abandoned(staging: Path) -> None:
    """Removes a staging folder whose process is gone, and its lock with it."""
    try:
        descriptor = os.open(staging, os.O_RDONLY)
    except OSError:
        return  # removed just now by the process it belongs to, or another user's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(staging, ignore_errors=True)
    except BlockingIOError:
        pass  # in use
    finally:
        os.close(descriptor)


def _problems(error: ValidationError) -> str:
    """In one line what is wrong with a manifest."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}"
        for problem in error.errors()
    )


def _hashes(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(
            sha256=sha256_of(path), size=path.stat().st_size
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
