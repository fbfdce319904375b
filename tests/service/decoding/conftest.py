"""What the tests of decoders share: limits, requests, and a server of its own process."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest

from model.config import Preprocessing
from model.video import Limits
from service.decoding.messages import DecoderLimits
from service.settings import MIB

SEEN = Preprocessing(num_frames=4, image_size=32, frame_stride=4)
LIMITS = DecoderLimits(memory_bytes=2048 * MIB, timeout_s=120.0, video=Limits())

# Started as the command `timesformer` starts. Waits for a line before it decodes once more.
_SERVER = """
import sys
from service.__main__ import main

if __name__ == "__main__":
    import asyncio, multiprocessing, pathlib
    from service.decoding.messages import DecodeRequest
    from service.decoding.pool import DecoderPool
    from tests.service.decoding.conftest import LIMITS, SEEN

    async def run():
        pool = DecoderPool(2, LIMITS, lambda reason: None)
        await pool.start()
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        while sys.stdin.readline():
            await pool.decode(DecodeRequest(pathlib.Path(sys.argv[1]), SEEN, 1, 1))
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)

    import service.cli.main
    service.cli.main.cli = lambda: asyncio.run(run())
    main()
"""


class Server(NamedTuple):
    """A process with a pool of two decoders."""

    process: subprocess.Popen[str]
    decoders: list[int]

    def decode(self) -> list[int]:
        """Decodes a video; returns the decoders after that."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read_pids()

    def read_pids(self) -> list[int]:
        assert self.process.stdout is not None
        return [int(pid) for pid in self.process.stdout.readline().split()]


@pytest.fixture(scope="session")
def start_server(
    video: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., AbstractContextManager[Server]]:
    """Starts a `Server`; the arguments are variables of its environment."""
    script = tmp_path_factory.mktemp("server") / "server.py"
    script.write_text(_SERVER)

    @contextlib.contextmanager
    def start(stderr: int | None = None, **environment: str) -> Iterator[Server]:
        path = os.pathsep.join([*environment.pop("PYTHONPATH", "").split(), str(Path.cwd())])
        environment = {**os.environ, **environment, "PYTHONPATH": path}
        environment.pop("OPENBLAS_NUM_THREADS", None)  # which a pool of this process has set
        process = subprocess.Popen(
            [sys.executable, script, video],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
        with process:
            try:
                server = Server(process, [])
                server.decoders.extend(server.read_pids())
                yield server
            finally:
                process.kill()

    return start


def wait_until_ended(pids: Iterable[int]) -> None:
    """Waits until all processes have ended; kills those that have not after a minute."""
    for pid in pids:
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([process], [], [], 60)
        os.close(process)
        if not ended:
            os.kill(pid, 9)
        assert ended, f"process {pid} outlives its server"
