"""The sandbox of decoders, from the inside: what a file that takes its decoder over could do."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.video import Clips, load_clips
from service.decoding import sandbox
from service.decoding.messages import DecodeRequest, DecoderLimits
from service.decoding.pool import DecoderPool
from service.errors import VideoRejectedError
from service.observability.metrics import Metrics
from service.server.app import tell_of_sandbox
from service.settings import SettingsError, load_settings
from tests.service.conftest import Serve
from tests.service.decoding.conftest import LIMITS, SEEN

# Each attempt in a process that has locked itself in; prints what came of it, by name.
_ATTEMPTS = """
import json, os, pathlib, resource, socket, subprocess, sys, threading, urllib.request
import numpy, av
from service.decoding import sandbox
folder = pathlib.Path(sys.argv[1])
folders = None if sys.argv[2] == "anywhere" else [folder]
layers = sandbox.enter(folders)

def thread():
    found = []
    worker = threading.Thread(target=found.append, args=(1,))
    worker.start()
    worker.join()
    return found

attempts = {
    "read": lambda: (folder / "video").read_bytes(),
    "list": lambda: list(folder.iterdir()),
    "read elsewhere": lambda: open("/etc/passwd").read(),
    "read the environment": lambda: open(f"/proc/{os.getppid()}/environ").read(),
    "write": lambda: (folder / "new").write_bytes(b"x"),
    "truncate": lambda: open(folder / "video", "r+").truncate(0),
    "remove": lambda: (folder / "video").unlink(),
    "rename": lambda: (folder / "video").rename(folder / "other"),
    "socket": socket.socket,
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "fork": os.fork,
    "program": lambda: os.execv("/bin/true", ["true"]),
    "child": lambda: subprocess.run(["/bin/true"]),
    "signal": lambda: os.kill(os.getppid(), 0),
    "thread": thread,
    "late import": lambda: __import__("xml.dom.minidom"),
    "less time": lambda: resource.setrlimit(resource.RLIMIT_CPU, (99, 99)),
}
outcomes = {}
for name, attempt in attempts.items():
    try:
        attempt()
        outcomes[name] = "done"
    except OSError as error:
        outcomes[name] = "refused" if isinstance(error, PermissionError) else repr(error)
print(json.dumps([layers, outcomes]))
"""
_NEEDED = {"read", "list", "thread", "late import", "less time"}


def attempt(folder: Path, where: str) -> tuple[list[str], dict[str, str]]:
    (folder / "video").write_bytes(b"x")
    run = subprocess.run(
        [sys.executable, "-c", _ATTEMPTS, str(folder), where],
        capture_output=True,
        text=True,
        check=True,
        env={"OPENBLAS_NUM_THREADS": "1"},
    )
    layers, outcomes = json.loads(run.stdout)
    if layers != list(sandbox.LAYERS):
        pytest.skip(f"this kernel has {layers or 'no layer of it'}")
    return layers, outcomes


def test_a_decoder_reads_its_folder_and_does_nothing_else(tmp_path: Path) -> None:
    _, outcomes = attempt(tmp_path, "folder")
    assert {name for name, outcome in outcomes.items() if outcome == "done"} == _NEEDED
    assert {outcomes[name] for name in outcomes.keys() - _NEEDED} == {"refused"}
    assert (tmp_path / "video").read_bytes() == b"x"


def test_without_folders_it_reads_anything_and_still_does_nothing_else(tmp_path: Path) -> None:
    _, outcomes = attempt(tmp_path, "anywhere")
    done = {name for name, outcome in outcomes.items() if outcome == "done"}
    assert done == _NEEDED | {"read elsewhere", "read the environment"}


def pool_decodes(path: Path, limits: DecoderLimits) -> tuple[Clips, tuple[str, ...]]:
    async def run() -> tuple[Clips, tuple[str, ...]]:
        pool = DecoderPool(1, limits, on_restart=lambda reason: None)
        await pool.start()
        try:
            return await pool.decode(DecodeRequest(path, SEEN, 1, 1)), pool.sandbox
        finally:
            pool.close()

    return asyncio.run(run())


def test_a_worker_reads_the_folder_that_it_is_given_and_no_other(
    video: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clips, layers = pool_decodes(video, LIMITS._replace(folders=(video.parent,)))
    assert (clips.frames == load_clips(video, SEEN).frames).all()
    if layers != sandbox.LAYERS:
        pytest.skip(f"this kernel has {layers or 'no layer of it'}")
    with pytest.raises(VideoRejectedError, match="cannot be read"):
        pool_decodes(video, LIMITS._replace(folders=(elsewhere,)))


def test_the_sandbox_can_be_turned_off(video: Path, tmp_path: Path) -> None:
    limits = LIMITS._replace(sandboxed=False, folders=(tmp_path,))
    _, layers = pool_decodes(video, limits)
    assert layers == ()


def test_what_holds_is_reported_and_what_is_required_must_hold(
    serve: Serve, tmp_path: Path
) -> None:
    with serve(spool_dir=tmp_path) as client:
        text = client.get("/metrics").text
    for layer in sandbox.LAYERS:
        assert re.search(rf'timesformer_decode_sandbox{{layer="{layer}"}} [01]\.0', text)
    settings = load_settings(device="cpu", decode_sandbox="required", spool_dir=tmp_path)
    decoders = DecoderPool(1, LIMITS, on_restart=lambda reason: None)
    decoders.sandbox = ("seccomp",)
    with pytest.raises(SettingsError, match=r"DECODE_SANDBOX.*landlock"):
        tell_of_sandbox(settings, Metrics(), decoders)
    decoders.close()
