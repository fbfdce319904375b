"""Decoded clips of a small set on disk: each video's first N views, drawn and decoded once.

    FOLDER/KEY/clips.u8      uint8 (videos, views, time, size, size, 3), no header
    FOLDER/KEY/cache.json    what KEY is made of, and the views that gave no clip
    FOLDER/KEY.partial/      one that is being filled, or was when its process was killed

KEY is a hash of all that decides the pixels, so that a cache is never taken for another run's.
While it fills, a journal names the videos that are done with the checksums of their clips; a fill
that was killed goes on behind what the checksums confirm. What is complete is renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.config import Preprocessing
from model.data.lists import Sample, VideoList
from model.data.process_pool import in_processes
from model.data.remote import local_video
from model.files import lock_file, sync, write_atomic
from model.training.data.loader import Replaced, View, view_clip
from model.training.errors import DataError, MissingVideo, UnreachableVideo

_CLIPS, _ABOUT, _JOURNAL = "clips.u8", "cache.json", "journal.jsonl"
_CODE = 1  # to be raised when the same draw gives other pixels than before


class Draws(NamedTuple):
    """All that decides the pixels of a cache, but the files' own contents."""

    videos: VideoList
    preprocessing: Preprocessing
    view: View
    seed: int

    def facts(self) -> dict[str, Any]:
        """What the key is a hash of; local files by size and time of change."""
        stamps = hashlib.sha256(repr([_stamp(each.path) for each in self.videos.samples]).encode())
        return {
            "videos": self.videos.fingerprint(),
            "files": stamps.hexdigest(),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "view": dataclasses.asdict(self.view),
            "seed": self.seed,
            "code": _CODE,
            "av": version("av"),
        }

    def shape(self) -> tuple[int, ...]:
        """(videos, views, time, size, size, 3)"""
        size = self.preprocessing.image_size
        count = len(self.videos.samples)
        return (count, self.view.cached, self.preprocessing.num_frames, size, size, 3)


class ClipCache:
    """A complete cache. Reads are from a memory map, and shared with other processes."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            if (folder / _CLIPS).stat().st_size != np.prod(shape):
                raise ValueError(f"{_CLIPS} has not the size it must have")
            self._clips = np.memmap(folder / _CLIPS, np.uint8, "r", shape=shape)
        except (OSError, ValueError) as error:
            raise DataError(f"the cache {folder} is damaged, delete it: {error}") from error
        self._failed = {
            (video, number): Replaced(*failure) for video, number, failure in about["failed"]
        }

    def clip(self, video: int, number: int) -> NDArray[np.uint8] | Replaced:
        """View `number` of a video, uint8 (time, size, size, 3); or why there is none."""
        return self._failed.get((video, number)) or np.asarray(self._clips[video, number])


def open_cache(
    folder: Path,
    draws: Draws,
    *,
    processes: int = 0,
    done: Callable[[int, int], object] = lambda count, videos: None,
) -> ClipCache:
    """The cache of these draws in `folder`; filled first, if it is not there or not complete.

    A second process that wants the same waits for the first.

    Args:
        processes: that decode; 0 decodes here.
        done: told how many videos are cached, of how many.

    Raises:
        DataError: it cannot be written, or takes more disk than there is.
    """
    facts = draws.facts()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    final, partial = folder / key, folder / f"{key}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / f".{key}.lock"):
            if not final.exists():
                _fill(partial, draws, processes, done)
                failed = [
                    [entry["video"], *failure]
                    for entry in _read_journal(partial)
                    for failure in entry["failed"]
                ]
                content = json.dumps({**facts, "failed": failed})
                write_atomic(partial / _ABOUT, content, durable=True)
                (partial / _JOURNAL).unlink()
                partial.rename(final)
    except OSError as error:
        raise DataError(
            f"cannot write the cache {folder}: {error.strerror or error}; the same command goes on "
            "where it ended"
        ) from error
    return ClipCache(final, draws.shape())


# ---- filling ----------------------------------------------------------------------------------


def _fill(folder: Path, draws: Draws, processes: int, done: Callable[[int, int], object]) -> None:
    """Decodes what the journal lacks, and leaves a journal of every video."""
    folder.mkdir(exist_ok=True)
    samples, shape = draws.videos.samples, draws.shape()
    _reserve(folder / _CLIPS, int(np.prod(shape)))
    kept = [entry for entry in _read_journal(folder) if _is_intact(folder, entry, shape)]
    lines = "".join(json.dumps(entry) + "\n" for entry in kept)
    write_atomic(folder / _JOURNAL, lines, durable=True)
    cached = {entry["video"] for entry in kept}
    items = [(number, each) for number, each in enumerate(samples) if number not in cached]
    work = functools.partial(_cache_video, folder=folder, draws=draws._replace(videos=_NONE))
    crashed = functools.partial(_crashed, views=draws.view.cached)
    with (folder / _JOURNAL).open("a", encoding="utf-8") as journal:
        for count, entry in enumerate(in_processes(work, items, processes, crashed), len(kept) + 1):
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            done(count, len(samples))
    sync(folder / _CLIPS)


_NONE = VideoList((), ())  # workers are told of one video at a time, not of all with each


def _cache_video(item: tuple[int, Sample], folder: Path, draws: Draws) -> dict[str, Any]:
    """Writes every view of one video; its entry for the journal."""
    video, sample = item
    failed, checksum = [], 0
    for number, clip in enumerate(_views(video, sample, draws)):
        if isinstance(clip, Replaced):
            failed.append([number, clip])
            clip = np.zeros(draws.shape()[2:], np.uint8)
        with (folder / _CLIPS).open("rb+") as file:
            file.seek((video * draws.view.cached + number) * clip.nbytes)
            file.write(clip.tobytes())
        checksum = zlib.crc32(clip.tobytes(), checksum)
    return {"video": video, "crc32": checksum, "failed": failed}


def _views(video: int, sample: Sample, draws: Draws) -> list[NDArray[np.uint8] | Replaced]:
    """Every view of a video, which is fetched once."""
    views = range(draws.view.cached)
    try:
        with local_video(sample.path) as path:
            local = sample._replace(path=path)
            clips = [
                view_clip(local, draws.preprocessing, draws.view, draws.seed, video, number)
                for number in views
            ]
    except MissingVideo as error:
        return [Replaced(sample.path, error.code, str(error)) for _ in views]
    except UnreachableVideo as error:
        # It may be there tomorrow; a cache is for good.
        raise DataError(
            f"{sample.path}: {error} The same command fills the cache on from here"
        ) from error
    return [
        each._replace(path=sample.path) if isinstance(each, Replaced) else each for each in clips
    ]


def _crashed(item: tuple[int, Sample], views: int) -> dict[str, Any]:
    video, sample = item
    failure = Replaced(sample.path, "decoder_crashed", "It crashes the decoder.")
    failed = [[number, failure] for number in range(views)]
    return {"video": video, "crc32": None, "failed": failed}


def _reserve(path: Path, size: int) -> None:
    """Takes the disk space at once, so that a full disk is known before hours of decoding."""
    with path.open("ab") as file:
        needed = size - os.fstat(file.fileno()).st_size
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise DataError(
                f"the cache takes {size / 1e9:.1f} GB and {path.parent.parent} has "
                f"{free / 1e9:.1f} GB left: make room, cache fewer views or elsewhere"
            )
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


def _read_journal(folder: Path) -> list[dict[str, Any]]:
    """Its entries in the order of videos, without a line that a kill cut off."""
    entries = {}
    try:
        lines = (folder / _JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
            entries[int(entry["video"])] = entry
        except (ValueError, KeyError, TypeError):
            continue
    return [entries[video] for video in sorted(entries)]


def _is_intact(folder: Path, entry: dict[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether a video's clips are those that the journal tells of; after a power cut they may not
    have reached the disk."""
    size = int(np.prod(shape[1:]))
    with (folder / _CLIPS).open("rb") as file:
        file.seek(entry["video"] * size)
        return entry["crc32"] is None or zlib.crc32(file.read(size)) == entry["crc32"]


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        facts = Path(path).stat()
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns
