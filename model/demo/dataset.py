"""The demo set as files: rendered motions as mp4, and the lists that `timesformer train` reads.

FOLDER/videos/train/000123.mp4       label 123 modulo 12, as everywhere in this package
FOLDER/videos/validation/000007.mp4  of other seeds
FOLDER/train.csv, validation.csv     path, label
FOLDER/labels.txt                    the twelve labels, in the order of the classes
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from pathlib import Path

from model.data.process_pool import in_processes
from model.demo import render
from model.demo.render import LABELS
from model.files import replacing, write_atomic
from model.training.errors import DataError

_SPLITS = {"train": 0, "validation": 1 << 31}  # what the seeds of a split's videos begin with


def write_demo_set(
    folder: Path,
    videos: int,
    held_out: int,
    *,
    seed: int = 0,
    processes: int = 2,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Renders the set into `folder`; videos that are there are kept, so that it can be interrupted.

    Args:
        videos, held_out: how many to train and to validate on; one of each label in turn.
        seed: the same seed gives the same videos; each has a seed of its own.
        processes: that render; 0 renders here.
        done: told how many videos there are.

    Raises:
        DataError: the folder cannot be written, or holds the videos of another seed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, seed)
        tasks = []
        for split, count in (("train", videos), ("validation", held_out)):
            (folder / "videos" / split).mkdir(parents=True, exist_ok=True)
            names = [f"videos/{split}/{index:06d}.mp4" for index in range(count)]
            write_atomic(folder / f"{split}.csv", _table(names))
            tasks += [
                (folder / name, index, [seed, _SPLITS[split], index])
                for index, name in enumerate(names)
            ]
        write_atomic(folder / "labels.txt", "".join(f"{label}\n" for label in LABELS))
        rendered = in_processes(_render, tasks, processes, crashed=_crashed)
        for count, _ in enumerate(rendered, start=1):
            done(count)
    except OSError as error:
        raise DataError(f"cannot write the demo set into {folder}: {error}") from error


_Task = tuple[Path, int, list[int]]


def _render(task: _Task) -> None:
    path, index, seed = task
    if path.exists():
        return
    _one_thread()
    with replacing(path, suffix=path.suffix[1:]) as temporary:  # the suffix names the container
        render.write_clip(temporary, LABELS[index % len(LABELS)], seed)


def _crashed(task: _Task) -> None:
    raise DataError(f"the process that rendered {task[0]} has died; is there enough memory?")


@functools.cache
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the processes share the cores already


def _claim(folder: Path, seed: int) -> None:
    """Notes the seed, and refuses a folder of another one."""
    note = folder / ".seed"
    if note.exists() and note.read_text() != str(seed):
        raise DataError(
            f"{folder} holds videos of seed {note.read_text()}: take another folder or that seed"
        )
    write_atomic(note, str(seed))


def _table(names: list[str]) -> str:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "label"])
    table.writerows([name, LABELS[index % len(LABELS)]] for index, name in enumerate(names))
    return text.getvalue()
