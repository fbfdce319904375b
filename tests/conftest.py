"""What all tests share: small real videos, and where the shared real files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """The folder of real files, sound and broken; tests that need it skip without it."""
    folder = SHARED / "videos"
    if not folder.is_dir():
        pytest.skip("the shared videos are not here")
    return folder
