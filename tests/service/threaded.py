"""A decoder that is a thread of the test's process: what `service.decoder.Worker` does, without the
start of a process (0.7 s of CPU time each), its limits and its sandbox.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from model.video import Clips, VideoError, load_clips, stream_windows
from service import sandbox
from service.decoder import Job, Worker, WorkerLimits, WorkerLostError
from service.errors import VideoRejectedError
from service.streaming import Piece, StreamJob

_POLL_S = 0.02


class ThreadedDecoder(Worker):
    """Decodes real files, at most one window ahead of the reader."""

    def __init__(self, limits: WorkerLimits) -> None:
        super().__init__(limits)
        self.sandbox = list(sandbox.LAYERS)
        self._killed_event = threading.Event()

    def start(self) -> None:
        """Starts nothing: each video gets a thread of its own."""

    def begin(self, job: Job | StreamJob, on_death: Callable[[], None]) -> None:
        self.decoded += 1
        self._killed_event = killed = threading.Event()
        self._results: queue.Queue[Any] = queue.Queue(1)
        arguments = (job, self._results, killed)
        threading.Thread(target=self._decode, args=arguments, daemon=True).start()

    def restart(self) -> None:
        self.stop()
        self.decoded = 0

    def kill(self) -> None:
        self._killed_event.set()

    def stop(self) -> None:
        self.kill()

    def clips(self, job: Job) -> Clips:
        return self._next()

    def next_piece(self, job: StreamJob) -> Piece:
        return self._next()

    def _next(self) -> Any:
        while not self._killed_event.is_set():
            try:
                result = self._results.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(result, Exception):
                raise result
            return result
        raise WorkerLostError("decoder_crashed", "The video was given up.")

    def _decode(
        self, job: Job | StreamJob, results: queue.Queue[Any], killed: threading.Event
    ) -> None:
        def put(result: object) -> None:
            while True:
                stop_if_killed()
                try:
                    return results.put(result, timeout=_POLL_S)
                except queue.Full:
                    continue

        def stop_if_killed() -> None:
            if killed.is_set():
                raise _KilledError

        try:
            if isinstance(job, StreamJob):
                seen, cut, limits = job.preprocessing, job.cut, job.limits
                put(stream_windows(job.path, seen, cut, put, tick=stop_if_killed, limits=limits))
            else:
                sizes = {"views": job.views, "crops": job.crops, "limits": self._limits.video}
                put(load_clips(job.path, job.preprocessing, **sizes))
        except VideoError as error:
            results.put(VideoRejectedError(error.code, str(error)))
        except _KilledError:
            return


class _KilledError(Exception):
    """The video is not wanted any more."""
