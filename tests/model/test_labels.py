from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.labels import LabelError, read_labels


def _written(folder: Path, text: str) -> Path:
    path = folder / "labels"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "archery\nyoga\ncafé\n",
        "archery\r\nyoga\r\ncafé",
        "\ufeffarchery\nyoga \ncafé\n\n\n",
        '["archery", "yoga", "café"]',
        '{"yoga": 1, "café": 2, "archery": 0}',
        ' {"2": "café", "0": "archery", "1": "yoga"}',
    ],
)
def test_every_published_form_gives_the_labels_in_order(tmp_path: Path, text: str) -> None:
    assert read_labels(_written(tmp_path, text)) == ("archery", "yoga", "café")


def test_indices_are_sorted_as_numbers(tmp_path: Path) -> None:
    labels = {str(index): f"class {index}" for index in reversed(range(12))}
    read = read_labels(_written(tmp_path, json.dumps(labels)))
    assert read == tuple(f"class {index}" for index in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no labels"),
        ("[]", "there are no labels"),
        ("{}", "there are no labels"),
        ("a\n\nb\n", "label 2 is ''"),
        ("a\nb\na\n", "label 3, 'a', stands already as label 1"),
        ('["a", 1]', "label 2 is 1"),
        ('{"a": 0, "b": 0}', "share index 0"),
        ('{"a": 0, "b": 2}', "none for 1: renumber"),
        ('{"1": "a", "2": "b"}', "none for 0"),
        ('{"0": "a", "0": "b"}', "'0' stands twice"),
        ('{"a": 0, "b": "one"}', "every label needs a whole number"),
        ('{"a": true}', "every label needs a whole number"),
        ("[1, 2", "begins like JSON"),
    ],
)
def test_labels_that_do_not_name_every_class_once_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(LabelError, match=message):
        read_labels(_written(tmp_path, text))


def test_an_absent_or_undecodable_file_is_a_label_error(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="cannot read labels"):
        read_labels(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(LabelError, match="cannot read labels"):
        read_labels(tmp_path / "latin")


def test_the_published_kinetics_labels_are_read(shared_fixtures: Path) -> None:
    labels = read_labels(shared_fixtures.parent / "labels" / "kinetics400.txt")
    assert len(labels) == 400
    assert labels[0] == "abseiling"


def test_labels_schemes_and_cost_are_read_without_torch() -> None:
    code = "import model.labels, model.network.cost, sys; raise SystemExit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
