from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def only_sequential(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on files are decoded from end to end: the reference."""
    return lambda: monkeypatch.setattr("model.video.decode.decode_at", lambda *_: False)
