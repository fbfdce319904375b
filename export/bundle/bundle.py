"""The bundle: the unit that is exported, verified, published, served and rolled back.

A folder `STORE/NAME/VERSION/`, immutable once published, with a `manifest.json` that says what is
in it. Versions count up from 1. The active version of a name is one small file, replaced
atomically (`export/bundle/pointers.py`). Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from export.bundle.manifest import MANIFEST, FileEntry, Manifest
from export.bundle.pointers import ACTIVE as ACTIVE
from export.bundle.pointers import (
    VERSION,
    read_candidate,
    read_history,
    write_candidate,
    write_history,
    writing,
)
from export.bundle.pointers import BundleError as BundleError
from export.bundle.pointers import Candidate as Candidate
from model.config import ConfigError
from model.files import lock_folder, sync

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STAGING = ".staging-"


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
            BundleError: names the first file that is missing, changed or failed, or that the disk
                does not give.
        """
        for name, entry in self.manifest.files.items():
            _check(self.path / name, entry)
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
        """Published versions of a name, oldest first; none if there is no such name.

        Raises:
            BundleError: the disk does not give them.
        """
        folder = self._folder(name)
        versions = (entry.name for entry in _entries(folder) if VERSION.fullmatch(entry.name))
        try:
            return sorted((v for v in versions if (folder / v / MANIFEST).is_file()), key=int)
        except OSError as error:
            raise BundleError(f"cannot read {folder}: {error.strerror}") from error

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
        with writing(folder), contextlib.ExitStack() as in_use:
            folder.mkdir(parents=True, exist_ok=True)
            with self._lock(name):
                for entry in folder.glob(f"{_STAGING}*"):
                    _remove_if_abandoned(entry)
                path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
                in_use.enter_context(lock_folder(path))
                in_use.callback(shutil.rmtree, path, ignore_errors=True)
            yield path

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
        """Lets one writer per name work at a time, across processes.

        The lock is on the folder of the name, which therefore is never removed here.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_folder(self._folder(name)))
            except (FileNotFoundError, NotADirectoryError):
                raise BundleError(f"{self.root} has no bundle named {name}") from None
            yield


def _check(path: Path, entry: FileEntry) -> None:
    try:
        if not path.is_file():
            raise BundleError(f"{path} is missing: publish the bundle again")
        if path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
            raise BundleError(f"{path} is not the file that was published: its hash is off")
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error


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
    """Removes a staging folder whose process is gone, and its lock with it.

    The folder stays if it is in use or belongs to another user.
    """
    with contextlib.suppress(OSError), lock_folder(staging, wait=False):
        shutil.rmtree(staging, ignore_errors=True)


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
