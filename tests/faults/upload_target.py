"""Coverage-guided fuzzing of what reads a request's body, with Atheris: forms, raw uploads and the
tensors of the Open Inference Protocol.

    PYTHONPATH=<packages of build/faults> python -m tests.faults.upload_target [-max_total_time=60]

Takes libFuzzer's options. An input may be refused with an error of ours and nothing else, and
leaves no file in the spool.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service", "python_multipart"]):
    from service.api.v2 import codec as tensors
    from service.ingest import uploads

from fastapi import Request

from service.errors import ServiceError
from service.ingest.spool import Spool
from service.ingest.upload_rate import Pace

_CLIP = (1, 2, 2, 3)
_MAX_BYTES = 4096
_ANY_PACE = Pace(timeout_s=60, least_rate=0, window_s=60)


def main() -> None:
    """Fuzzes until libFuzzer's options say that it is enough."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder))
        loop = asyncio.new_event_loop()

        def target(data: bytes) -> None:
            provider = atheris.FuzzedDataProvider(data)
            if provider.ConsumeBool():
                loop.run_until_complete(upload(provider, spool))
                assert list(spool.folder.iterdir()) == []
                assert spool.used_bytes == 0
            else:
                infer(provider)

        atheris.Setup(sys.argv, target)
        atheris.Fuzz()


async def upload(provider: atheris.FuzzedDataProvider, spool: Spool) -> None:
    """A body in pieces, with a content type and a length that need not be true."""
    kinds = [
        b"multipart/form-data; boundary=b",
        b"video/mp4",
        b"multipart/form-data",
        provider.ConsumeBytes(20),
    ]
    headers = [(b"content-type", kinds[provider.ConsumeIntInRange(0, 3)])]
    if provider.ConsumeBool():
        headers.append((b"content-length", str(provider.ConsumeInt(4)).encode()))
    pieces = []
    while provider.remaining_bytes():
        pieces.append(provider.ConsumeBytes(provider.ConsumeIntInRange(1, 200)))
    if provider.ConsumeBool():  # a form that is nearly right finds more than noise does
        start = b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\n'
        pieces = [start, *pieces, b"\r\n--b--\r\n"]

    async def receive() -> dict[str, object]:
        piece = pieces.pop(0) if pieces else b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    try:
        async with uploads.receive(request, spool, _MAX_BYTES, _ANY_PACE, sources=None) as received:
            assert received.path.stat().st_size == received.size <= _MAX_BYTES
    except ServiceError as error:
        refused_with(error, 400, 413)


def infer(provider: atheris.FuzzedDataProvider) -> None:
    """A body of the Open Inference Protocol, its JSON's length true or not."""
    encoding = ["identity", "gzip", "deflate", "br"][provider.ConsumeIntInRange(0, 3)]
    length = [None, "12", str(provider.ConsumeInt(3)), provider.ConsumeString(5)]
    header_length = length[provider.ConsumeIntInRange(0, 3)]
    content = provider.ConsumeBytes(provider.remaining_bytes())
    limit = uploads.Limit(_MAX_BYTES)
    body = tensors.Body(content, encoding, header_length)
    try:
        found = tensors.decode(body, _CLIP, max_clips=4, limit=limit)
        assert found.frames.shape[1:] == _CLIP
    except ServiceError as error:
        refused_with(error, 400, 413, 415)


def refused_with(error: ServiceError, *statuses: int) -> None:
    """Any other refusal of what a client sent is a finding."""
    if error.status not in statuses:
        raise AssertionError(f"refused with {error.status}: {error}") from error


if __name__ == "__main__":
    main()
