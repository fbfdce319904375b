"""Bodies of `multipart/form-data`, read as they come: a file's bytes, and what other parts say."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import BadRequestError
from service.ingest.url_policy import MAX_URL

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILE_FIELD, SOURCE_FIELD = "file", "source_url"
_MAX_FIELD_BYTES = 1024
_MAX_PARTS = 32


class Form:
    """A push parser: the file's bytes go to `sink`, other parts to `fields`.

    Raises:
        BadRequestError: from each method, when the body is none of one video and a few fields.
    """

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
        self._delimiter = b"\r\n--" + boundary
        self._delimiters, self._tail = 0, b""
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
        except FormParserError as error:
            raise BadRequestError(f"The multipart body cannot be read: {error}.") from error

    def write(self, data: bytes) -> None:
        self._count_delimiters(data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BadRequestError(f"The multipart body cannot be read: {error}.") from error

    def _count_delimiters(self, data: bytes) -> None:
        """Each costs the parser microseconds, also where it ends no part, so that a body of them
        would keep the event loop to itself. In the data of a part there is none (RFC 2046).
        """
        short = len(self._delimiter) - 1
        across = self._tail + data[:short]
        self._delimiters += across.count(self._delimiter) + data.count(self._delimiter)
        self._tail = (across if len(data) < short else data)[-short:]
        if self._delimiters > _MAX_PARTS:
            raise BadRequestError(
                f"The multipart body has more than {_MAX_PARTS} parts, or its boundary within them."
            )

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
            if self._files > 1:
                raise BadRequestError(
                    f"The multipart body has 2 parts named '{FILE_FIELD}'; send one video."
                )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE_FIELD:
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
