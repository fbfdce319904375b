"""The log of a run has every step once."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.training.errors import TrainingError
from model.training.event_log import RunLog, read_log


def test_going_on_removes_what_comes_later_and_what_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, 0) as log:
        for step in range(1, 6):
            log.write("step", step, loss=1 / step)
    path.write_bytes(path.read_bytes() + b'{"event": "step", "st')
    with RunLog(path, 3) as log:
        log.write("step", 4, loss=0.5)
    assert [(line["step"], line["loss"]) for line in read_log(path)[2:]] == [(3, 1 / 3), (4, 0.5)]
    assert len(read_log(path)) == 4


def test_where_it_cannot_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot write"):
        RunLog(tmp_path / "file" / "log.jsonl", 0)
