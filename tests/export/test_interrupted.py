"""An export to every precision that is killed, or that finds the disk full, at any of its files:
the store is as it was, byte for byte, and the next export goes well."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from export.bundle import Bundle, BundleError, BundleStore
from export.graphs import Precision
from export.manifest import GRAPHS, MANIFEST, ONNX_FLOAT32
from export.pipeline import export_bundle
from model.checkpoints import Checkpoint, save_safetensors

pytestmark = pytest.mark.slow

ALL: tuple[Precision, ...] = ("fp16", "int8", "fp8")
MADE = [file for file in GRAPHS.values() if file != ONNX_FLOAT32]

# Imports once, then dies once for each line it is given: a fork exports, and when it is about to
# write the file that the line names, it leaves half a file and gets SIGKILL.
EXPORTER = textwrap.dedent("""
    import os, shutil, signal, sys
    from pathlib import Path
    import onnx, onnxruntime, torch
    import export.pipeline as pipeline
    from export.bundle import BundleStore
    from model.checkpoints import load_checkpoint

    weights, video, graph, store = map(Path, sys.argv[1:])
    pipeline.export_onnx = lambda model, path: shutil.copy(graph, path)

    def export(last):
        def watch(event, arguments):
            if event == "open" and str(arguments[0]).endswith(f"/{last}"):
                if isinstance(arguments[1], str) and "w" in arguments[1]:
                    descriptor = os.open(arguments[0], os.O_WRONLY | os.O_CREAT)
                    os.write(descriptor, b"half")
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        torch.set_num_threads(1)
        pipeline.export_bundle(
            load_checkpoint(weights), "tiny", BundleStore(store), videos=[video],
            precisions=["fp16", "int8", "fp8"],
        )

    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                export(line.strip())
            finally:
                os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
""")


def contents(store: BundleStore) -> dict[str, bytes]:
    """Every file of the store that a reader sees: not what is being written, nor locks."""
    files = (path for path in store.root.rglob("*") if path.is_file())
    by_name = {path.relative_to(store.root).as_posix(): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in by_name.items()
        if "/.staging-" not in name and not name.endswith(".lock")
    }


def leftovers(store: BundleStore) -> list[Path]:
    return list((store.root / "tiny").glob(".staging-*"))


@pytest.fixture
def filled(exported: Bundle, store: BundleStore) -> BundleStore:
    """A store with one version, which is active."""
    shutil.copytree(exported.path.parent, store.root / "tiny")
    store.activate("tiny", exported.version)
    return store


def check_next_export(checkpoint: Checkpoint, store: BundleStore, video: Path) -> None:
    bundle = export_bundle(checkpoint, "tiny", store, videos=[video], precisions=ALL)
    assert store.versions("tiny") == ["1", "2"]
    assert store.active("tiny") == "1"
    bundle.verify()
    assert set(GRAPHS.values()) <= bundle.manifest.files.keys()
    assert leftovers(store) == []


@pytest.fixture
def dies_at(
    checkpoint: Checkpoint, exported: Bundle, filled: BundleStore, video: Path, tmp_path: Path
) -> Iterator[Callable[[str], int]]:
    """Exports in a process that is killed as it writes a file of that name; gives its status."""
    weights = tmp_path / "weights.safetensors"
    save_safetensors(checkpoint.build(), weights, checkpoint.config, labels=checkpoint.labels)
    paths = [weights, video, exported.file(ONNX_FLOAT32), filled.root]
    with subprocess.Popen(
        [sys.executable, "-c", EXPORTER, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        to, back = process.stdin, process.stdout

        def die(file: str) -> int:
            to.write(f"{file}\n")
            to.flush()
            return int(back.readline())

        yield die


def test_a_killed_export_leaves_the_store_as_it_was_and_the_next_one_cleans_up(
    dies_at: Callable[[str], int],
    checkpoint: Checkpoint,
    filled: BundleStore,
    video: Path,
    quick_export: None,
) -> None:
    before = contents(filled)
    for file in (*MADE, MANIFEST):
        assert dies_at(file) == -signal.SIGKILL
        (folder,) = leftovers(filled)
        assert (folder / file).read_bytes() == b"half", "it died in the middle"
        assert contents(filled) == before, file
        assert filled.versions("tiny") == ["1"]
        assert filled.active("tiny") == "1"
        filled.open("tiny").verify()
    check_next_export(checkpoint, filled, video)


STEPS = {
    "model.int8.onnx": "rounding to INT8",
    "model.fp16.onnx": "rounding to FP16",
    "model.int8-qdq.onnx": "comparing ranges for INT8: max",
    "model.fp8.onnx": "comparing ranges for FP8: max",
    "manifest.json": "publishing",
}
"""The last step before each file is written."""


def test_a_full_disk_is_one_error_and_leaves_the_store_as_it_was(
    checkpoint: Checkpoint,
    filled: BundleStore,
    video: Path,
    full_disk: Callable[[int], AbstractContextManager[None]],
    quick_export: None,
) -> None:
    """Not a bundle with one graph less, though `auto` may leave out what fails."""
    before = contents(filled)
    for last in STEPS.values():
        with contextlib.ExitStack() as held:

            def fill(step: str, last: str = last, held: contextlib.ExitStack = held) -> None:
                if step == last:
                    held.enter_context(full_disk(1000))

            with pytest.raises(BundleError, match=r"cannot write .* nothing has changed"):
                export_bundle(
                    *(checkpoint, "tiny", filled),
                    videos=[video],
                    precisions=["auto"],
                    report=fill,
                )
        assert contents(filled) == before, last
        assert leftovers(filled) == []
        filled.open("tiny").verify()
    check_next_export(checkpoint, filled, video)
