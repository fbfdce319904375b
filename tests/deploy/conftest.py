"""Tools that check what is deployed; `make deploy-tools` brings them, else their tests skip."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a tool in the project's root, or skips the test if it is not there."""

    def run_tool(tool: str, *words: str | Path) -> object:
        return subprocess.run(
            [find(tool), *words], cwd=ROOT, capture_output=True, text=True, check=False
        )

    return run_tool


def find(tool: str) -> str:
    """The path of a tool; skips the test if there is none."""
    path = os.pathsep.join([str(ROOT / "build/tools/bin"), os.environ["PATH"]])
    found = shutil.which(tool, path=path)
    if found is None:
        pytest.skip(f"{tool} is not here: `make deploy-tools`, or install it")
    return found


def passed(done: subprocess.CompletedProcess[str]) -> str:
    """What a tool printed, if it found nothing wrong."""
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output
