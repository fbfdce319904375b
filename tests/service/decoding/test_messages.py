"""What a decoder says is checked before the server believes it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import orjson
import pytest

from model.video import Cut, Limits, VideoFacts
from service.decoding.messages import (
    DecodeRequest,
    StalledError,
    StreamRequest,
    receive_clips,
    receive_stream_message,
)
from service.settings import MIB
from tests.service.decoding.conftest import SEEN

REQUEST = DecodeRequest(Path("video"), SEEN, 1, 1)
STREAM = StreamRequest(Path("video"), SEEN, Cut(1.0, 1.0, 1, 10), Limits())
FACTS = {
    "width": 96,
    "height": 64,
    "rotation": 0,
    "frame_rate": None,
    "frames": 60,
    "duration_s": 2.0,
    "codec": "h264",
    "container": "mp4",
}
ANSWER = {"times": [[0.0, 0.1, 0.2, 0.3]], "facts": FACTS, "truncated": False, "sampling": "dense"}
WINDOW = {"kind": "window", "number": 0, "start_s": 0.0, "end_s": 1.0, "times": [0.0]}
PIXELS = bytes(4 * 32 * 32 * 3)
LIES: list[dict[str, object]] = [
    {"times": [[0.0]]},
    {"times": "soon"},
    {"times": [[0.0, 0.1, 0.2, "nan"]]},
    {"sampling": "random"},
    {"facts": ["h264"]},
]
LIES_OF_FACTS: list[dict[str, object]] = [
    {"width": "96"},
    {"height": -1},
    {"rotation": None},
    {"frames": 1.5},
    {"duration_s": "long"},
    {"frame_rate": ""},
    {"codec": 264},
    {"container": "x" * 1000},
    {"password": "x"},
]
# What `DecoderProcess` counts as a crash.
TAKEN_OVER = (EOFError, OSError, ValueError, KeyError, TypeError)


def pipe_with(*messages: bytes) -> Connection:
    """The server's end of a pipe in which the decoder has left these messages, and has ended."""
    ours, theirs = multiprocessing.Pipe()
    for message in messages:
        theirs.send_bytes(message)
    theirs.close()
    return ours


def test_answer_of_a_sound_decoder_is_accepted() -> None:
    clips = receive_clips(pipe_with(orjson.dumps(ANSWER), PIXELS), REQUEST, 1.0)
    assert clips.facts == VideoFacts(**FACTS)  # type: ignore[arg-type]
    assert clips.frames.shape == (1, 4, 32, 32, 3)


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize(
    "answers",
    [
        [pickle.dumps(_Harm())],
        [b"{}"],
        [b"[]"],
        [orjson.dumps(ANSWER)],
        [orjson.dumps(ANSWER), b"short"],
        [orjson.dumps(ANSWER), PIXELS + b"x"],
        [orjson.dumps(ANSWER) + b" " * 9_000_000, PIXELS],
        [b'{"code": "of_its_own_making", "detail": "x"}'],
        [b'{"code": ["empty_file"], "detail": "x"}'],
        [b'{"code": "empty_file", "detail": 7}'],
        *([orjson.dumps({**ANSWER, **lie}), PIXELS] for lie in LIES),
        *([orjson.dumps({**ANSWER, "facts": {**FACTS, **lie}}), PIXELS] for lie in LIES_OF_FACTS),
    ],
)
def test_answer_of_a_decoder_that_was_taken_over_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    ours, theirs = multiprocessing.Pipe()

    def send() -> None:
        for answer in answers:
            try:
                theirs.send_bytes(answer)
            except OSError:  # a message that is too long is not read
                break
        theirs.close()

    sending = threading.Thread(target=send)
    sending.start()
    with pytest.raises(TAKEN_OVER):
        receive_clips(ours, REQUEST, 60.0)
    ours.close()
    sending.join(60)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "other"},
        {"kind": ["window"]},
        {**WINDOW, "number": 11},
        {**WINDOW, "end_s": None},
        {"kind": "opened", "facts": FACTS, "windows": -1},
        {"kind": "ended", "facts": {}, "windows": 1, "truncated": False},
    ],
)
def test_message_of_a_decoder_that_was_taken_over_is_rejected(message: dict[str, object]) -> None:
    with pytest.raises(TAKEN_OVER):
        receive_stream_message(pipe_with(orjson.dumps(message), PIXELS), STREAM, 1.0)


class Endless(Connection):
    """The end of a pipe whose next message claims to have a terabyte, and must not be read."""

    _theirs: Connection

    @classmethod
    def after(cls, *messages: bytes) -> Endless:
        ours, theirs = multiprocessing.Pipe()
        for message in messages:
            theirs.send_bytes(message)
        theirs._send((-1).to_bytes(4, "big", signed=True) + (2**40).to_bytes(8, "big"))  # type: ignore[attr-defined]
        connection = cls(os.dup(ours.fileno()))
        connection._theirs = theirs
        return connection

    def _recv(self, size: int, *more: Any) -> Any:
        assert size < MIB, "all of the message is read"
        return super()._recv(size, *more)  # type: ignore[misc]


def test_message_without_end_is_not_read() -> None:
    with pytest.raises(TAKEN_OVER):
        receive_clips(Endless.after(), REQUEST, 1.0)
    with pytest.raises(TAKEN_OVER):
        receive_clips(Endless.after(orjson.dumps(ANSWER)), REQUEST, 1.0)
    with pytest.raises(TAKEN_OVER):
        receive_stream_message(Endless.after(orjson.dumps(WINDOW)), STREAM, 1.0)


def test_decoder_without_progress_has_stalled() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send_bytes(b'{"kind":"progress"}')
    with pytest.raises(StalledError):
        receive_stream_message(ours, STREAM, 0.0)
    theirs.send_bytes(orjson.dumps(ANSWER))
    with pytest.raises(StalledError):
        receive_clips(ours, REQUEST, 0.0)


def test_decoder_that_stops_in_the_middle_of_a_message_has_stalled() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send_bytes(orjson.dumps(ANSWER))
    theirs._send(len(PIXELS).to_bytes(4, "big") + PIXELS[:100])  # type: ignore[attr-defined]
    with pytest.raises(StalledError):
        receive_clips(ours, REQUEST, 0.1)
