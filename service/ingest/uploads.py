"""Uploads to spool files: streamed in blocks, limited while they are read, deleted on every path.

A body is either the video itself or `multipart/form-data` with the video in the part `file` and
parameters in other parts; instead of the video it may have `source_url`, also as JSON. No video is
ever held in memory whole. Tensors are: `receive_tensors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import orjson
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from service.errors import BadRequestError, ClientDisconnectedError, UploadTooLargeError
from service.ingest.disconnect import until_disconnect
from service.ingest.memory_budget import Share
from service.ingest.multipart import SOURCE_FIELD, Form
from service.ingest.spool import Spool, SpoolFile
from service.ingest.upload_rate import Pace, Watch
from service.ingest.url_sources import Sources
from service.settings import MIB

_BLOCK = MIB


class Limit(NamedTuple):
    """The largest body that is accepted."""

    bytes: int
    reason: str = "the limit of this service"
    """For people."""


_OF_JSON = Limit(16 * 1024, "the limit of a JSON body")


class Upload(NamedTuple):
    """A received video."""

    path: Path
    size: int
    fields: dict[str, str]
    """The other parts of a multipart body."""
    seconds: float


@contextlib.asynccontextmanager
async def receive(
    request: Request, spool: Spool, max_bytes: int, pace: Pace, sources: Sources | None
) -> AsyncIterator[Upload]:
    """Receives the request's video into the spool, or reads it from the URL that the request names;
    the file is gone at the end of the block. Without `sources` the URL is left among the fields.

    Raises:
        UploadTooLargeError: the body is larger than `max_bytes`.
        UploadTimeoutError: it came more slowly than `pace`.
        BadRequestError: it is no multipart body with a `file`, though it says so.
        ClientDisconnectedError: the client went away.
        SpoolFullError: the disk is full, or the spool's quota used up.
        SourceRefusedError, SourceFailedError: as `Sources.fetch`.
    """
    started = time.perf_counter()
    spool.expect(_announced_size(request, Limit(max_bytes)))
    with spool.file() as file:
        async with Watch(pace) as watch:
            fields = await _receive(request, file, max_bytes, watch)
            watch.complete()
            if sources is not None and (url := fields.pop(SOURCE_FIELD, None)) is not None:
                with until_disconnect(request.receive):
                    await sources.fetch(url, file, max_bytes)
        file.close()
        yield Upload(file.path, file.size, fields, time.perf_counter() - started)


async def receive_tensors(
    request: Request, limit: Limit, pace: Pace, share: Share
) -> bytes | bytearray:
    """Receives a body that goes to the network as it is, in memory.

    Raises:
        UploadTooLargeError, UploadTimeoutError, ClientDisconnectedError: as `receive`.
        MemoryFullError: there is no room for it.
    """
    share.memory.expect(_announced_size(request, limit))
    body = bytearray()
    async with Watch(pace) as watch:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError("The client went away.")
            chunk: bytes = message.get("body", b"")
            if len(body) + len(chunk) > limit.bytes:
                raise _too_large(limit)
            share.take(len(chunk))
            is_last = not message.get("more_body", False)
            if is_last and not body:
                return chunk
            body += chunk
            if is_last:
                return body
            watch.note(len(chunk))


async def receive_json(request: Request, pace: Pace) -> object:
    """Receives a small body of JSON. An endpoint reads it by itself: the framework would read what
    it declares before it asks who sends it, and whatever its size.

    Raises:
        UploadTooLargeError, UploadTimeoutError, ClientDisconnectedError: as `receive`.
        BadRequestError: it is no JSON.
    """
    _announced_size(request, _OF_JSON)
    async with Watch(pace) as watch:
        return await _json(request, watch)


async def _receive(
    request: Request, file: SpoolFile, max_bytes: int, watch: Watch
) -> dict[str, str]:
    content_type, options = parse_options_header(request.headers.get("content-type"))
    if content_type == b"application/json":
        return _fields(await _json(request, watch))
    fields: dict[str, str] = {}
    write: Callable[[bytes], object] = file.add
    form = None
    if content_type == b"multipart/form-data":
        form = Form(options.get(b"boundary", b""), file.add)
        write, fields = form.write, form.fields
    async for chunk in _chunks(request, Limit(max_bytes), watch):
        write(chunk)
        if file.pending > _BLOCK:
            with watch.paused():
                await asyncio.to_thread(file.write)
    with watch.paused():
        await asyncio.to_thread(file.write)
    if form is not None:
        form.finish()
    return fields


async def _json(request: Request, watch: Watch) -> object:
    body = bytearray()
    async for chunk in _chunks(request, _OF_JSON, watch):
        body += chunk
    try:
        return orjson.loads(body)
    except ValueError:
        raise BadRequestError("The body is to be JSON and is none.") from None


async def _chunks(request: Request, limit: Limit, watch: Watch) -> AsyncIterator[bytes]:
    """The body as it comes."""
    received = 0
    try:
        async for chunk in request.stream():
            watch.note(len(chunk))
            received += len(chunk)
            if received > limit.bytes:
                raise _too_large(limit)
            yield chunk
    except ClientDisconnect:
        raise ClientDisconnectedError("The client went away.") from None


def _fields(content: object) -> dict[str, str]:
    """A JSON body's parameters, one of which is the video's URL."""
    if not isinstance(content, dict) or not isinstance(content.get(SOURCE_FIELD), str):
        raise BadRequestError(
            f"A JSON body is an object with the video's URL in '{SOURCE_FIELD}'; or send the video."
        )
    fields = {name: value for name, value in content.items() if value is not None}
    if not all(isinstance(value, str | int | float) for value in fields.values()):
        raise BadRequestError("The values of a JSON body are strings and numbers.")
    return {name: str(value) for name, value in fields.items()}


def _announced_size(request: Request, limit: Limit) -> int:
    """What the client says its body's size is; 0 if it does not say.

    Raises:
        UploadTooLargeError: it is over the limit.
    """
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() else 0
    if size > limit.bytes:
        raise _too_large(limit)
    return size


def _too_large(limit: Limit) -> UploadTooLargeError:
    return UploadTooLargeError(
        f"The upload is larger than {limit.bytes / MIB:,.2f} MiB, {limit.reason}."
    )
