"""One decoder process as the server sees it: started, set to a video, killed, replaced.

Decoders are forked from a fork server of `multiprocessing`, a process that has the imports of
`child.py` and nothing else, so that a decoder starts in hundredths of a second and shares the
memory of its imports. What that means for the sandbox:

- The fork server has one thread, no engine, no keys and no client's data. It ends with the server,
  because only the server holds its pipe, and its decoders end with it (`model/processes.py`).
- Forked processes share their address layout. A file that crashes its decoder may have guessed at
  an address, and could try the next guess against the same layout. So a decoder that a file has
  crashed is replaced by processes that are *spawned*: each of them has a layout of its own.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import orjson

from model.video import Clips
from service.decoding.child import decoder_main
from service.decoding.messages import (
    STARTED,
    DecodeRequest,
    DecoderLimits,
    StalledError,
    StreamMessage,
    StreamRequest,
    receive_clips,
    receive_stream_message,
)
from service.errors import DecoderUnavailableError

logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_TRIES = 3


class DecoderStartError(RuntimeError):
    """A decoder process does not start."""


class DecoderCrashedError(Exception):
    """The decoder process is lost, or must be replaced; `code` is a key of VIDEO_STATUS."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class DecoderProcess:
    """One decoder process, used by one thread at a time."""

    def __init__(self, limits: DecoderLimits) -> None:
        self._limits = limits
        self._process: BaseProcess | None = None
        self._lock = threading.Lock()  # of `_process` and `killed`
        self._crashed = False  # by a file, once: processes are spawned from then on
        self.killed = False
        """`kill` was called; `restart` is needed before the next video."""
        self.lost = False
        """The process crashed or hung; `restart` is needed before the next video."""
        self.decoded = 0
        self.sandbox: list[str] = []

    def start(self) -> None:
        """Starts the process; tries again if the process ends while it starts.

        Raises:
            DecoderStartError: no process started, or `kill` was called.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(EOFError, OSError, ValueError):
                self._start_once()
                return
            self._discard()
            if self.killed:
                break
        raise DecoderStartError("a decoder process did not start")

    def _start_once(self) -> None:
        # numpy's threads would stay outside the sandbox, and a fork needs a single thread.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        multiprocessing.set_forkserver_preload([decoder_main.__module__])
        forked = multiprocessing.get_context("forkserver")
        context = multiprocessing.get_context("spawn") if self._crashed else forked
        with contextlib.ExitStack() as unless_started:
            ours, theirs = context.Pipe()
            unless_started.enter_context(ours)
            with theirs:
                process = context.Process(
                    target=decoder_main, args=(theirs, self._limits), daemon=True, name="decoder"
                )
                process.start()
            unless_started.pop_all()
        with self._lock:
            self._connection, self._process = ours, process
            if self.killed:
                process.kill()
        self.decoded = 0
        self.lost = False
        if not self._connection.poll(_START_TIMEOUT_S):
            raise TimeoutError
        self.sandbox = orjson.loads(self._connection.recv_bytes())

    def begin(self, request: DecodeRequest | StreamRequest, on_death: Callable[[], None]) -> None:
        """Sends a request. A process that dies before it opens the file is replaced.

        Args:
            on_death: called for each process that died.

        Raises:
            DecoderUnavailableError: no process starts, or lives for long enough.
            DecoderCrashedError: the process does not answer in time, or `kill` was called.
        """
        self.decoded += 1
        for _ in range(_TRIES):
            self._make_ready(on_death)
            with contextlib.suppress(EOFError, OSError):
                self._connection.send_bytes(pickle.dumps(request))
                if not self._connection.poll(self._limits.timeout_s):
                    self.lost = True
                    raise DecoderCrashedError(
                        "decoding_timeout",
                        f"No decoder started on the video within {self._limits.timeout_s:g} s.",
                    )
                if self._connection.recv_bytes(len(STARTED)) == STARTED:
                    return
            self._check_wanted()
            on_death()
            self._discard()
        raise DecoderUnavailableError("Decoders do not live for long enough at present.")

    def _make_ready(self, on_death: Callable[[], None]) -> None:
        """Starts the process if it was never started, or has died since its last video."""
        self._check_wanted()
        if self._process is not None and not self._process.is_alive():
            on_death()
            self._discard()
        if self._process is None:
            try:
                self.start()
            except DecoderStartError as error:
                self._check_wanted()
                raise DecoderUnavailableError("No decoder can be started at present.") from error

    def _check_wanted(self) -> None:
        if self.killed:
            raise DecoderCrashedError("decoder_crashed", "The video was abandoned.")

    def restart(self) -> None:
        """Replaces the process now, so that the next video need not wait for it."""
        self._discard()
        self.killed = self.lost = False
        try:
            self.start()
        except DecoderStartError:
            logger.exception("a lost decoder cannot be replaced; the next video tries again")

    def kill(self) -> None:
        """Ends the process; may be called while another thread waits for its answer."""
        with self._lock:
            self.killed = True
            if self._process is not None and self._process.is_alive():
                self._process.kill()

    def stop(self) -> None:
        """Ends the process for good and waits until it has ended."""
        self.kill()
        self._discard()

    def _discard(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._connection.close()
            process.join()
            process.close()

    def clips(self, request: DecodeRequest) -> Clips:
        """Waits for the clips of the video that the process decodes.

        Raises:
            VideoRejectedError: the decoder rejects the video.
            DecoderCrashedError: the decoder crashed, was taken over, or takes too long.
        """
        slow = f"The video took longer than {self._limits.timeout_s:g} s to decode."
        with self._losses(slow):
            return receive_clips(self._connection, request, self._limits.timeout_s)

    def next_message(self, request: StreamRequest) -> StreamMessage:
        """Waits for the next message of the long video that the process decodes.

        Raises:
            VideoRejectedError, DecoderCrashedError: as `clips`.
        """
        slow = f"Decoding the video made no progress for {self._limits.timeout_s:g} s."
        with self._losses(slow):
            return receive_stream_message(self._connection, request, self._limits.timeout_s)

    @contextlib.contextmanager
    def _losses(self, slow: str) -> Iterator[None]:
        try:
            yield
        except StalledError:
            self.lost = True
            raise DecoderCrashedError("decoding_timeout", slow) from None
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            self.lost = True
            if not self.killed:
                self._crashed = True
            raise DecoderCrashedError(
                "decoder_crashed", "The video broke its decoder; it is damaged or hostile."
            ) from error
