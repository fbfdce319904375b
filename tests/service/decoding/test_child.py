"""What runs in a decoder: what it imports, what it keeps open, and that it ends with its server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import orjson
import pytest

from service.decoding import child
from service.decoding.child import decoder_main
from service.decoding.messages import DecodeRequest
from service.decoding.sandbox import LAYERS
from tests.processes import descendants_of
from tests.service.decoding.conftest import LIMITS, SEEN, Server, wait_until_ended

_PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
StartServer = Callable[..., AbstractContextManager[Server]]

# Run by every Python process that has its folder on the path: at SIGUSR1 a process names what it
# has imported. A decoder may write to standard error only.
_SPY = """
import os, signal, sys

def report(*_):
    names = {id(module): name for name, module in sys.modules.items()}.values()  # some have two
    os.write(2, (" ".join(set(names) - {"sitecustomize"}) + "\\n").encode())

signal.signal(signal.SIGUSR1, report)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, start_server: StartServer) -> Iterator[Server]:
    """A server whose decoders name their modules on standard error at SIGUSR1."""
    folder = tmp_path_factory.mktemp("spy")
    (folder / "sitecustomize.py").write_text(_SPY)
    with start_server(stderr=subprocess.PIPE, PYTHONPATH=str(folder)) as server:
        yield server


def test_decoder_imports_only_what_decoding_needs(server: Server) -> None:
    scripts = tomllib.loads(_PYPROJECT.read_text())["project"]["scripts"]
    assert scripts["timesformer"] == "service.__main__:main", "what the server of this test imports"
    assert server.process.stderr is not None
    for pid in server.decoders:
        os.kill(pid, signal.SIGUSR1)
        modules = set(server.process.stderr.readline().split())
        packages = {name.partition(".")[0] for name in modules}
        assert {"av", "numpy", "orjson", "model", "service"} <= packages
        ours = {name for name in modules if name.split(".")[0] in ("export", "model", "service")}
        assert {name for name in ours if not name.startswith("model.video")} == {
            "model",
            "model.config",
            "model.processes",
            "service",
            "service.decoding",
            "service.decoding.child",
            "service.decoding.messages",
            "service.decoding.sandbox",
            "service.errors",
        }
        assert not packages & {"click", "fastapi", "opentelemetry", "prometheus_client"}
        assert not packages & {"asyncio", "onnxruntime", "pydantic", "starlette", "torch"}
        assert len(modules) < 320, " ".join(sorted(modules))


def test_decoders_are_forked_from_a_process_with_one_thread(server: Server) -> None:
    parents = {_status(pid)["PPid"] for pid in server.decoders}
    (fork_server,) = parents
    assert fork_server != str(server.process.pid)
    assert _status(int(fork_server))["Threads"] == "1"
    # Without it numpy starts threads, which OpenBLAS 0.3 stops, but need not stop, at a fork.
    assert b"OPENBLAS_NUM_THREADS=1" in Path(f"/proc/{fork_server}/environ").read_bytes()


def test_decoder_holds_no_file_but_its_pipe(server: Server) -> None:
    for pid in server.decoders:
        names = {entry.name for entry in Path(f"/proc/{pid}/fd").iterdir()}
        assert len(names - {"0", "1", "2"}) == 1


def test_busy_decoders_end_with_a_server_that_is_killed(start_server: StartServer) -> None:
    with start_server() as server:
        for pid in server.decoders:
            os.kill(pid, signal.SIGSTOP)  # a busy decoder does not look at its pipe either
        processes = descendants_of(server.process.pid)
        assert set(server.decoders) < processes
        server.process.kill()
        wait_until_ended(processes)


def test_decoders_and_fork_server_are_replaced_when_the_fork_server_is_killed(
    start_server: StartServer,
) -> None:
    with start_server() as server:
        os.kill(int(_status(server.decoders[0])["PPid"]), signal.SIGKILL)
        wait_until_ended(server.decoders)
        replaced = {pid for _ in server.decoders for pid in server.decode()}
        assert not replaced & set(server.decoders)


def test_decoder_whose_server_has_ended_ends() -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    decoder = context.Process(target=decoder_main, args=(theirs, LIMITS))
    decoder.start()
    theirs.close()
    assert set(orjson.loads(ours.recv_bytes())) <= set(LAYERS)
    ours.close()
    decoder.join(60)
    assert decoder.exitcode == 0


def test_video_over_the_memory_limit_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(child, "load_clips", load)
    ours, theirs = multiprocessing.Pipe()
    with child._rejections(theirs):
        child._send_clips(theirs, DecodeRequest(Path("video"), SEEN, 1, 1), LIMITS.video)
    assert orjson.loads(ours.recv_bytes())["code"] == "video_too_large"


def _status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
