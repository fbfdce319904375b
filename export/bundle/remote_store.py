"""A store of bundles in an object store (`s3://`, `gs://`, whatever fsspec knows), and its cache.

It is laid out as a local one: `URL/NAME/VERSION/` with a manifest that is uploaded last, so that a
version is whole once it is seen, and `URL/NAME/active.json`, one small object that is replaced.
Services never read it while they answer: they follow it into a folder of their node.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from export.bundle.bundle import Bundle, BundleError, BundleStore
from export.bundle.manifest import MANIFEST, Manifest
from export.bundle.pointers import (
    ACTIVE,
    CANDIDATE,
    VERSION,
    Candidate,
    history_text,
    parse_candidate,
    parse_history,
    writing,
)
from model.files import lock_folder

Answer = TypeVar("Answer")


class StoreUnreachableError(BundleError):
    """The object store does not answer, or not us; what was fetched before is as it was."""


class RemoteStore:
    """Bundles by name and version at a URL.

    Raises:
        BundleError: nothing that is installed reaches such a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self._files, self._root = url_to_fs(self.url)
        except ImportError as error:
            raise BundleError(
                f"{self.url} needs a package that is not installed ({error}): "
                "the extra `objectstore` of timesformer-service brings those for s3:// and gs://"
            ) from error
        except Exception as error:  # a scheme that nobody knows; credentials that are not there
            raise BundleError(f"{self.url} cannot be used: {error}") from error

    def names(self) -> list[str]:
        """Names that have a folder, sorted."""
        return self._children("")

    def versions(self, name: str) -> list[str]:
        """Whole versions of a name, oldest first."""
        found = [version for version in self._children(name) if VERSION.fullmatch(version)]
        whole = [v for v in found if self._read(f"{name}/{v}/{MANIFEST}") is not None]
        return sorted(whole, key=int)

    def history(self, name: str) -> list[str]:
        """As `BundleStore.history`."""
        content = self._read(f"{name}/{ACTIVE}")
        return [] if content is None else parse_history(content, self._at(f"{name}/{ACTIVE}"))

    def candidate(self, name: str) -> Candidate | None:
        """As `BundleStore.candidate`."""
        path = f"{name}/{CANDIDATE}"
        content = self._read(path)
        return None if content is None else parse_candidate(content, self._at(path))

    def push(self, bundle: Bundle) -> bool:
        """Uploads a version of a local store; says whether it was not there yet.

        Raises:
            BundleError: it is damaged, or the number is taken by another bundle.
            StoreUnreachableError: it could not be uploaded; no version was added.
        """
        bundle.verify()
        version = f"{bundle.name}/{bundle.version}"
        manifest = (bundle.path / MANIFEST).read_bytes()
        there = self._read(f"{version}/{MANIFEST}")
        if there is not None and there != manifest:
            raise BundleError(
                f"{self._at(version)} is another bundle: a published version never changes. "
                "Publish this one under the next number"
            )
        if there is not None:
            return False
        for name in bundle.manifest.files:
            self._send(bundle.path / name, f"{version}/{name}")
        self._write(f"{version}/{MANIFEST}", manifest)
        return True

    def pull(self, name: str, version: str, cache: BundleStore) -> Bundle:
        """A version as a folder of the node's cache; downloaded and checked if it is not there.

        Replicas that share the cache fetch it once: the others wait for the first.

        Raises:
            BundleError: there is no such version, or what came is not what was published.
            StoreUnreachableError: it could not be fetched; the cache is as it was.
        """
        with _alone(cache.root):
            if version in cache.versions(name):
                return cache.open(name, version)
            content = self._read(f"{name}/{version}/{MANIFEST}")
            if content is None:
                raise BundleError(f"{self.url} has no version {version} of {name}")
            with cache.staging(name) as staging:
                (staging / MANIFEST).write_bytes(content)
                bundle = Bundle(staging)
                if (bundle.name, bundle.version) != (name, version):
                    raise BundleError(
                        f"{self._at(f'{name}/{version}')} is {bundle.name} version {bundle.version}"
                    )
                for file in bundle.manifest.files:
                    self._fetch(f"{name}/{version}/{file}", staging / file)
                return cache.adopt(staging)

    def activate(self, name: str, version: str) -> None:
        """Makes a version the active one; services that follow take it over.

        Raises:
            BundleError: it is not whole, or did not pass verification; nothing has changed.
        """
        content = self._read(f"{name}/{version}/{MANIFEST}")
        if content is None:
            raise BundleError(f"{self.url} has no version {version} of {name}: push it first")
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            raise BundleError(f"{name} version {version} cannot be read: {error}") from error
        for file, entry in manifest.files.items():
            path = f"{self._root}/{name}/{version}/{file}"
            if self._ask(functools.partial(self._files.size, path)) != entry.size:
                raise BundleError(f"{self._at(f'{name}/{version}/{file}')} is not of its size")
        if not all(result.passed for result in manifest.verification.values()):
            raise BundleError(f"{name} version {version} did not pass verification")
        history = self.history(name)
        if history[:1] != [version]:
            self._write(f"{name}/{ACTIVE}", history_text([version, *history]).encode())
        candidate = self.candidate(name)
        if candidate is not None and candidate.version == version:
            self._ask(lambda: self._files.rm_file(f"{self._root}/{name}/{CANDIDATE}"))

    def follow(self, cache: BundleStore, names: Sequence[str] = ()) -> None:
        """Makes the cache have, and point to, the active version and the candidate of each name.

        Args:
            names: by default all that there are.

        Raises:
            BundleError: a version cannot be used; the pointers to it are not taken over.
            StoreUnreachableError: the store does not answer; the cache is as it was.
        """
        for name in names or self.names():
            history, candidate = self.history(name), self.candidate(name)
            for version in (*history[:1], *([candidate.version] if candidate else [])):
                self.pull(name, version, cache)
            if history:
                cache.follow(name, history, candidate)

    def _children(self, name: str) -> list[str]:
        folder = f"{self._root}/{name}".rstrip("/")

        def children() -> list[str]:
            self._files.invalidate_cache(folder)
            try:
                found = self._files.ls(folder, detail=True)
            except FileNotFoundError:
                return []
            folders = (item["name"] for item in found if item["type"] == "directory")
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in folders)

        return self._ask(children)

    def _read(self, path: str) -> bytes | None:
        def read() -> bytes | None:
            try:
                return bytes(self._files.cat_file(f"{self._root}/{path}"))
            except FileNotFoundError:
                return None

        return self._ask(read)

    def _write(self, path: str, content: bytes) -> None:
        """Replaces an object, which an object store does at once."""
        target = f"{self._root}/{path}"

        def write() -> None:
            if "file" not in self._files.protocol:
                self._files.pipe_file(target, content)
                return
            folder, name = target.rsplit("/", 1)
            self._files.makedirs(folder, exist_ok=True)
            self._files.pipe_file(f"{folder}/.{name}.new", content)
            self._files.mv(f"{folder}/.{name}.new", target)

        self._ask(write)

    def _send(self, local: Path, path: str) -> None:
        target = f"{self._root}/{path}"

        def send() -> None:
            self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._files.put_file(str(local), target)

        self._ask(send)

    def _fetch(self, path: str, local: Path) -> None:
        with writing(local):
            local.parent.mkdir(parents=True, exist_ok=True)
        self._ask(lambda: self._files.get_file(f"{self._root}/{path}", str(local)))

    def _ask(self, do: Callable[[], Answer]) -> Answer:
        try:
            return do()
        except FileNotFoundError as error:
            raise BundleError(f"{self.url} lacks a file: {error}") from error
        except Exception as error:  # every file system has a tree of its own
            raise StoreUnreachableError(
                f"{self.url} cannot be reached: {error or type(error).__name__}"
            ) from error

    def _at(self, path: str) -> str:
        return f"{self.url}/{path}"


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Locks the local store for one process of this node at a time."""
    with contextlib.ExitStack() as stack:
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(root))
        yield
