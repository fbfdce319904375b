"""States on disk: the newest intact one is found, whatever happened to the others."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from model.training.checkpoint import KEPT, load_newest, save  # noqa: E402
from model.training.errors import CheckpointError  # noqa: E402


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
