"""Work in processes: in order, and a process that dies costs one item."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model.data.process_pool import in_processes

REPOSITORY = Path(__file__).parents[3]


def work(item: int) -> int:
    if item == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if item < 0:
        raise ValueError("negative")
    return item * item


def crashed(item: int) -> int:
    return -item


@pytest.mark.parametrize("processes", [0, 2])
def test_answers_come_in_order(processes: int) -> None:
    assert list(in_processes(work, range(12), processes, crashed)) == [i * i for i in range(12)]


def test_an_item_that_kills_its_process_costs_only_itself() -> None:
    answers = list(in_processes(work, range(10, 22), 2, crashed))
    assert answers == [-i if i == 13 else i * i for i in range(10, 22)]


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="negative"):
        list(in_processes(work, [1, -1], 1, crashed))


KILLED = """
import os, signal
from tests.model.data.test_process_pool import crashed, own_number
from model.data.process_pool import in_processes

if __name__ == "__main__":
    for number in in_processes(own_number, range(100), 2, crashed):
        print(number, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def own_number(item: int) -> int:
    return os.getpid()


def test_workers_end_with_a_parent_that_is_killed() -> None:
    """They would wait for work for good, and whoever reads what the parent wrote would too."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        output, _ = process.communicate()  # until the last of them has closed it
    assert process.returncode == -signal.SIGKILL
    assert int(output) != process.pid
