"""The README names what exists, and pages and files that are made agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from export.bundle.bundle import BundleStore
from model.demo import SAMPLE_CLIP, STORE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"serve", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_reference_is_the_one_that_the_code_makes() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "docs.reference"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == (ROOT / "docs/reference.md").read_text(), "run `make docs`"


def test_the_bundled_model_is_whole_small_and_says_how_good_it_is() -> None:
    bundle = BundleStore(STORE).open("demo")
    bundle.verify()
    size = sum(path.stat().st_size for path in STORE.rglob("*") if path.is_file())
    assert size + SAMPLE_CLIP.stat().st_size < 10e6
    assert bundle.manifest.training is not None
    assert bundle.manifest.training["metrics"]["top1"] >= 0.95
