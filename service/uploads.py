"""Uploads to spool files: streamed in blocks, limited while they are read, deleted on every path.

A body is either the video itself or `multipart/form-data` with the video in the part `file` and
parameters in other parts; instead of the video it may have `source_url`, also as JSON. No video is
ever held in memory whole. Tensors are: `receive_tensors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from service.errors import (
    BadRequestError,
    ClientDisconnectedError,
    UploadTimeoutError,
    UploadTooLargeError,
)
from service.outgoing import MAX_URL
from service.settings import MIB
from service.sources import Sources
from service.spool import Spool, SpoolFile

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILE_FIELD, SOURCE_FIELD = "file", "source_url"
_BLOCK = MIB
_MAX_FIELD_BYTES = 1024
_MAX_FIELDS = 32
_MAX_JSON_BYTES = 16 * 1024


class Limit(NamedTuple):
    """The largest body that is accepted."""

    bytes: int
    reason: str = "the limit of this service"
    """For people."""


class Upload(NamedTuple):
    """A received video."""

    path: Path
    size: int
    fields: dict[str, str]
    """The other parts of a multipart body."""
    seconds: float


@contextlib.asynccontextmanager
async def receive(
    request: Request, spool: Spool, max_bytes: int, timeout_s: float, sources: Sources | None
) -> AsyncIterator[Upload]:
    """Receives the request's video into the spool, or reads it from the URL that the request names;
    the file is gone at the end of the block. Without `sources` the URL is left among the fields.

    Raises:
        UploadTooLargeError: the body is larger than `max_bytes`.
        UploadTimeoutError: it was not there within `timeout_s`.
        BadRequestError: it is no multipart body with a `file`, though it says so.
        ClientDisconnectedError: the client went away.
        SpoolFullError: the disk is full, or the spool's quota used up.
        SourceRefusedError, SourceFailedError: as `Sources.fetch`.
    """
    started = time.perf_counter()
    announced = _announced_size(request, Limit(max_bytes))
    with spool.file() as file:
        file.reserve(announced)
        try:
            async with asyncio.timeout(timeout_s):
                fields = await _receive(request, file, max_bytes)
                if sources is not None and (url := fields.pop(SOURCE_FIELD, None)) is not None:
                    await _unless_left(request, sources.fetch(url, file, max_bytes))
        except TimeoutError:
            raise _too_slow(timeout_s) from None
        except ClientDisconnect:
            raise ClientDisconnectedError("The client went away.") from None
        file.close()
        yield Upload(file.path, file.size, fields, time.perf_counter() - started)


async def receive_tensors(request: Request, limit: Limit, timeout_s: float) -> bytes | bytearray:
    """Receives a body that goes to the network as it is, in memory.

    Raises:
        UploadTooLargeError, UploadTimeoutError, ClientDisconnectedError: as `receive`.
    """
    _announced_size(request, limit)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnectedError("The client went away.")
                chunk: bytes = message.get("body", b"")
                if len(body) + len(chunk) > limit.bytes:
                    raise _too_large(limit)
                is_last = not message.get("more_body", False)
                if is_last and not body:
                    return chunk
                body += chunk
                if is_last:
                    return body
    except TimeoutError:
        raise _too_slow(timeout_s) from None


async def _receive(request: Request, file: SpoolFile, max_bytes: int) -> dict[str, str]:
    content_type, options = parse_options_header(request.headers.get("content-type"))
    if content_type == b"application/json":
        return await _receive_json(request)
    fields: dict[str, str] = {}
    write: Callable[[bytes], object] = file.add
    form = None
    if content_type == b"multipart/form-data":
        form = _Form(options.get(b"boundary", b""), file.add)
        write, fields = form.write, form.fields
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(Limit(max_bytes))
        write(chunk)
        if file.pending > _BLOCK:
            await asyncio.to_thread(file.write)
    await asyncio.to_thread(file.write)
    if form is not None:
        form.finish()
    return fields


async def _receive_json(request: Request) -> dict[str, str]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_JSON_BYTES:
            raise _too_large(Limit(_MAX_JSON_BYTES, "the limit of a JSON body"))
    try:
        content = orjson.loads(body)
    except ValueError:
        raise BadRequestError("The body is said to be JSON and is none.") from None
    if not isinstance(content, dict) or not isinstance(content.get(SOURCE_FIELD), str):
        raise BadRequestError(
            f"A JSON body is an object with the video's URL in '{SOURCE_FIELD}'; or send the video."
        )
    fields = {name: value for name, value in content.items() if value is not None}
    if not all(isinstance(value, str | int | float) for value in fields.values()):
        raise BadRequestError("The values of a JSON body are strings and numbers.")
    return {name: str(value) for name, value in fields.items()}


async def _unless_left(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Waits for `work`, and cancels it when the client goes."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError("The client went away.")
        task.result()
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # it has the file


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


def _too_slow(timeout_s: float) -> UploadTimeoutError:
    return UploadTimeoutError(f"The upload was not complete after {timeout_s:g} s.")


def _too_large(limit: Limit) -> UploadTooLargeError:
    return UploadTooLargeError(
        f"The upload is larger than {limit.bytes / MIB:,.2f} MiB, {limit.reason}."
    )


class _Form:
    """A push parser of multipart bodies: the file's bytes go to `sink`, other parts to `fields`."""

    def __init__(self, boundary: bytes, sink: Callable[[bytes], None]) -> None:
        if not boundary:
            raise BadRequestError("The multipart body has no boundary in its Content-Type.")
        self.fields: dict[str, str] = {}
        self._sink = sink
        self._name = ""
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = bytearray(), bytearray()
        self._files = 0
        self._complete = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except MultipartParseError as error:
            raise BadRequestError(f"The multipart body cannot be read: {error}.") from error

    def write(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise BadRequestError(f"The multipart body cannot be read: {error}.") from error

    def finish(self) -> None:
        """Checks that the body was whole and had one file in it."""
        if not self._complete:
            raise BadRequestError("The multipart body ends before its last boundary.")
        if self._files != (0 if SOURCE_FIELD in self.fields else 1):
            raise BadRequestError(
                f"The multipart body has {self._files} parts named '{FILE_FIELD}'; send one video, "
                f"or its URL in '{SOURCE_FIELD}'."
            )

    def _part_begin(self) -> None:
        self._headers, self._header, self._value = {}, bytearray(), bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == FILE_FIELD:
            self._files += 1
        elif len(self.fields) >= _MAX_FIELDS:
            raise BadRequestError(f"The multipart body has more than {_MAX_FIELDS} fields.")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE_FIELD:
            if self._files == 1:
                self._sink(data[start:end])
            return
        self._value += data[start:end]
        most = MAX_URL if self._name == SOURCE_FIELD else _MAX_FIELD_BYTES
        if len(self._value) > most:
            raise BadRequestError(
                f"The multipart field '{self._name[:40]}' is longer than {most} bytes."
            )

    def _part_end(self) -> None:
        if self._name != FILE_FIELD:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._complete = True
