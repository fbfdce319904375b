"""What all tests share: small real videos, and where the shared real files lie."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
SHARED = TESTS.parents[1] / "shared"
MARKED_FOLDERS = {"e2e": pytest.mark.e2e, "benchmarks": pytest.mark.benchmark}
SMOKE_TEST = TESTS / "e2e" / "test_smoke.py"  # the one of its folder that `make test` runs

# Property tests try the same examples each time, however slow the machine is.
settings.register_profile(
    "bounded",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("bounded")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of a folder in `MARKED_FOLDERS`, and lets tests that start processes run on.

    The limits are against hangs; on a machine that has other work torch alone starts in minutes.
    """
    for item in items:
        mark = MARKED_FOLDERS.get(item.path.relative_to(TESTS).parts[0])
        if mark is not None and item.path != SMOKE_TEST:
            item.add_marker(mark)
        if mark is not None or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seeds torch for each test, so that no test depends on what its worker ran before."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Returns a function that fills a folder once per run, in the first worker that needs it.

    Tests of all workers read the folder, so that no test may change its files.
    """
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # the one folder that all workers of pytest-xdist know

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        made, unfinished = root / name, root / f"{name}.unfinished"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                fill(unfinished)
                unfinished.rename(made)
        return made

    return make


class Program(NamedTuple):
    """The one field of the exporter's answer that `export_onnx` reads."""

    model_proto: Any


@pytest.fixture(scope="session")
def one_export_of_each_network(make_once: MakeOnce) -> Iterator[None]:
    """Runs torch's exporter once per run for each network, which takes 4 to 12 s of CPU.

    The networks are those with the same modules, configuration and weights. Coverage does not trace
    the exporter, because tracing doubles that time.
    """
    import onnx
    import torch

    export = torch.onnx.export

    def export_once(model: Any, *inputs: Any, **options: Any) -> Program:
        def fill(folder: Path) -> None:
            trace = sys.gettrace()
            sys.settrace(None)
            try:
                program = export(model, *inputs, **options)
                onnx.save(program.model_proto, folder / "model.onnx")
            finally:
                sys.settrace(trace)

        return Program(onnx.load(make_once(f"graph-{_digest(model)}", fill) / "model.onnx"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", export_once)
        yield


def _digest(model: Any) -> str:
    """Returns a hash of the network's modules, configuration and weights."""
    code = type(model).forward.__code__  # a test may patch it
    digest = hashlib.sha256(f"{model!r} {model.config!r} {code.co_qualname}".encode())
    digest.update(code.co_code)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """The folder of real files, sound and broken; tests that need it skip without it."""
    folder = SHARED / "videos"
    if not folder.is_dir():
        pytest.skip("the shared videos are not here")
    return folder


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for that of a socket, which may have 107 bytes in all."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def short_path(short_folder: Path) -> Path:
    """A `tmp_path` in it."""
    return Path(tempfile.mkdtemp(dir=short_folder))
