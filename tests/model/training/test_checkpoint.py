"""States on disk: the newest intact one is found, whatever happened to the others."""

from __future__ import annotations

import pickle
import resource
from pathlib import Path

import pytest
import torch

from model.training.checkpoint import KEPT, load_newest, save
from model.training.errors import CheckpointError


def state(number: int) -> dict[str, object]:
    return {"weights": torch.full((1000,), float(number)), "name": "x"}


def test_the_newest_is_loaded_and_old_ones_are_removed(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "absent") is None
    for step in (9, 10, 100):
        save(tmp_path, step, state(step))
    found = load_newest(tmp_path)
    assert found is not None
    assert found[0] == 100
    assert torch.equal(found[1]["weights"], torch.full((1000,), 100.0))
    assert len(list(tmp_path.iterdir())) == KEPT


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "pickle"])
def test_a_damaged_newest_is_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, state(1))
    newest = save(tmp_path, 2, state(2))
    content = bytearray(newest.read_bytes())
    content[-2000] ^= 4
    replacements = {
        "flip": bytes(content),
        "cut": bytes(content[:-50]),
        "empty": b"",
        "pickle": pickle.dumps({"weights": 1}),
    }
    newest.write_bytes(replacements[damage])
    found = load_newest(tmp_path)
    assert found is not None
    assert found[0] == 1
    assert str(newest) in caplog.text


def test_where_none_is_intact_training_does_not_begin_again_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1)).write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        load_newest(tmp_path)


def test_save_on_a_full_disk_is_an_error_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files fails a write as a full disk does."""
    save(tmp_path, 1, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="make room"):
            save(tmp_path, 2, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.ckpt"]
