"""Multipart bodies that want more than a video and a few fields."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.errors import BadRequestError
from service.ingest.multipart import Form

FILE = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
FIELD = b'\r\n--b\r\nContent-Disposition: form-data; name="x"\r\n\r\ny'
END = b"\r\n--b--\r\n"


def pieces_of(body: bytes, size: int) -> Iterator[bytes]:
    return (body[start : start + size] for start in range(0, len(body), size))


def parse(body: bytes, size: int) -> tuple[Form, bytes]:
    video = bytearray()
    form = Form(b"b", video.extend)
    for piece in pieces_of(body, size):
        form.write(piece)
    form.finish()
    return form, bytes(video)


SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 50, 100_000])


@SIZES
def test_a_video_and_fields_come_out_whatever_the_pieces(size: int) -> None:
    form, video = parse(FILE + b"a\r\n-\r\n--a" + FIELD * 30 + END, size)
    assert video == b"a\r\n-\r\n--a"
    assert form.fields == {"x": "y"}


@SIZES
@pytest.mark.parametrize("filler", [FIELD, b"\r\n--b_", b"\r\n--b\r\n\r\n", b"\r\n--b \r\n\r\n"])
def test_neither_parts_nor_what_looks_like_their_ends_come_without_end(
    filler: bytes, size: int
) -> None:
    with pytest.raises(BadRequestError, match="more than 32 parts"):
        parse(FILE + filler * 40, size)


def test_a_second_video_is_refused_as_it_begins() -> None:
    form = Form(b"b", bytearray().extend)
    with pytest.raises(BadRequestError, match="2 parts"):
        form.write(FILE + b"a\r\n" + FILE)


def test_a_boundary_that_is_too_long_is_the_clients_fault() -> None:
    with pytest.raises(BadRequestError, match="cannot be read"):
        Form(b"b" * 300, bytearray().extend)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"nonsense", "cannot be read"),
        (b"--b--\r\n", "0 parts"),
        (FILE + b"abc", "ends before"),
        (FIELD[2:] + b"y" * 2000 + END, "longer than"),
    ],
)
def test_a_form_that_is_malformed_is_refused_with_the_reason(body: bytes, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        parse(body, 100)
