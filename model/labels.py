"""Label files: the name of every class, in the order of the model's logits. No torch.

Read are plain text (one label a line) and the JSON forms in which labels are published:
`["a", "b"]`, `{"a": 0, "b": 1}` (Kinetics) and `{"0": "a", "1": "b"}` (Hugging Face `id2label`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class LabelError(ValueError):
    """Labels that do not name every class exactly once; the message says what to change."""


def read_labels(path: str | Path) -> tuple[str, ...]:
    """The labels of a file, UTF-8, in the order of the classes.

    A file whose text begins with `[` or `{` is JSON. In plain text, spaces around a label and
    empty lines at the end are dropped.

    Raises:
        LabelError: the file cannot be read, or its labels are empty, repeated or have gaps.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(f"cannot read labels from {path}: {error}") from error
    try:
        if text.lstrip()[:1] in ("[", "{"):
            return labels_from_json(json.loads(text, object_pairs_hook=_object))
        return _checked([line.strip() for line in text.rstrip().splitlines()])
    except json.JSONDecodeError as error:
        raise LabelError(f"{path} begins like JSON but is not: {error}") from error
    except LabelError as error:
        raise LabelError(f"{path}: {error}") from error


def labels_from_json(value: Any) -> tuple[str, ...]:
    """Labels from one of the three JSON forms, parsed.

    Raises:
        LabelError: another form, or labels that are empty, repeated or have gaps.
    """
    if isinstance(value, list):
        return _checked(value)
    if not isinstance(value, dict):
        raise LabelError('labels must be ["a", ...], {"a": 0, ...} or {"0": "a", ...}')
    if all(_is_index(index) for index in value.values()):
        return _checked(_in_order({index: label for label, index in _unique(value)}))
    if all(isinstance(key, str) and key.isdecimal() for key in value):
        return _checked(_in_order({int(key): label for key, label in value.items()}))
    raise LabelError("every label needs a whole number: {label: index} or {index: label}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python would keep the last of two equal keys and lose the other label."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise LabelError(f"{repeated!r} stands twice; remove one")
    return result


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(label_to_index: dict[str, int]) -> list[tuple[str, int]]:
    seen: dict[int, str] = {}
    for label, index in label_to_index.items():
        if index in seen:
            raise LabelError(f"{seen[index]!r} and {label!r} share index {index}; renumber one")
        seen[index] = label
    return list(label_to_index.items())


def _in_order(by_index: dict[int, Any]) -> list[Any]:
    expected = set(range(len(by_index)))
    if by_index.keys() != expected:
        absent = sorted(expected - by_index.keys())[:5]
        raise LabelError(
            f"{len(by_index)} labels must have the indices 0 to {len(by_index) - 1}; "
            f"there is none for {', '.join(map(str, absent))}: renumber them without gaps"
        )
    return [by_index[index] for index in range(len(by_index))]


def _checked(labels: list[Any]) -> tuple[str, ...]:
    if not labels:
        raise LabelError("there are no labels; write one a line, in the order of the classes")
    first_at: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if not isinstance(label, str) or not label.strip():
            raise LabelError(f"label {number} is {label!r}; give every class a name")
        if label in first_at:
            raise LabelError(
                f"label {number}, {label!r}, stands already as label {first_at[label]}; "
                "rename one of them"
            )
        first_at[label] = number
    return tuple(labels)
