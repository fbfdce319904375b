"""A bundle that says which colour a video has, and an archive of videos of one colour each."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.bundle.bundle import BundleStore
from tests.export.conftest import COLOURS, full_disk, publish_colours, write_video

__all__ = ["full_disk"]


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    store = BundleStore(tmp_path / "store")
    store.activate("colours", publish_colours(store).version)
    return store


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos, `red-0.mp4` and so on, and three files that are none."""
    folder = tmp_path_factory.mktemp("archive")
    for colour in COLOURS:
        first = write_video(folder / f"{colour}-0.mp4", colour)
        for number in range(1, 4):
            (folder / f"{colour}-{number}.mp4").write_bytes(first.read_bytes())
    (folder / "empty.mp4").touch()
    (folder / "words.mp4").write_bytes(b"no video at all, only words")
    (folder / "folder.mp4").mkdir()
    return folder
