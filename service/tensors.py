"""Open Inference Protocol bodies: JSON with tensors in it, or JSON and then the tensors' bytes.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and Triton's
extensions "binary tensor data" and "http compression". Bytes in, clips out; arrays in, bytes out.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from service.errors import InvalidTensorError, UnsupportedEncodingError, UploadTooLargeError
from service.schemas_infer import InferOutput, InferRequest
from service.settings import MAX_JSON_BYTES
from service.uploads import Limit

HEADER_LENGTH = "Inference-Header-Content-Length"
INPUT, DATATYPE = "frames", "UINT8"
OUTPUTS = ("logits", "embedding")
# Without the numbers of a tensor. It is parsed in one go, and hostile JSON of this size takes
# some milliseconds and MB; of 8 MiB it took a second and a quarter, with the interpreter locked.
MAX_HEADER_BYTES = 64 * 1024
# Numbers are parsed in pieces, so that other threads get their turn: a millisecond each.
_PIECE = 64 * 1024
_WINDOW = {"gzip": 31, "deflate": 15}  # deflate is the zlib format, RFC 9110 section 8.4.1.2
_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_BRACKETS_TO_SPACES = bytes.maketrans(b"[]", b"  ")
_NOT_BONES = b"0123456789 \t\r\n"


class Body(NamedTuple):
    """A request's body as it came, with the headers that tell how to read it."""

    content: bytes | bytearray
    encoding: str = "identity"
    """Content-Encoding."""
    header_length: str | None = None
    """Inference-Header-Content-Length: bytes of JSON, before the tensors' own."""

    @property
    def is_quick(self) -> bool:
        """Whether it is decoded so fast that a thread for it would only cost."""
        # Five digits: JSON of less than 100 kB, and tensors' bytes are not looked at.
        short_json = self.header_length is not None and len(self.header_length) <= 5
        short = short_json or len(self.content) <= MAX_HEADER_BYTES
        return short and self.encoding == "identity"


class Inference(NamedTuple):
    """A request for inference that is in order."""

    request: InferRequest
    frames: NDArray[np.uint8]
    """(clips, time, height, width, 3)"""


@functools.lru_cache(maxsize=64)  # of a few models
def body_limit(
    in_json: bool, clip_shape: tuple[int, ...], max_clips: int, max_bytes: int, max_held: int
) -> Limit:
    """What no body may be longer than.

    Args:
        in_json: whether all of it is JSON.
        max_clips: most clips that it may bring.
        max_bytes: of any body.
        max_held: most bytes in memory.
    """
    if in_json:
        own = Limit(MAX_JSON_BYTES, "the most that is taken as JSON; send the tensor as bytes")
    else:
        largest = MAX_HEADER_BYTES + max_clips * math.prod(clip_shape)
        own = Limit(largest, f"enough for {max_clips} clips, the most that one request may bring")
    held = Limit(max_held, "the most that this service holds in memory")
    return min(own, held, Limit(max_bytes))


def decode(body: Body, clip_shape: tuple[int, ...], *, max_clips: int, limit: Limit) -> Inference:
    """Reads a request for inference.

    Args:
        clip_shape: (time, height, width, 3) that the network takes.
        max_clips: most clips that it may bring.
        limit: for the body after decompression.

    Raises:
        InvalidTensorError: it is malformed, or not what this network takes.
        UnsupportedEncodingError, UploadTooLargeError: see there.
    """
    content = memoryview(_decompressed(body, limit))
    length = _header_length(body.header_length, len(content))
    header, numbers = _split(bytes(content[:length]))
    request = _request(header)
    shape = _shape(request, clip_shape, max_clips)
    size = request.inputs[0].parameters.binary_data_size
    given = len(content) - length
    if size is None:
        if given:
            raise InvalidTensorError(f"{given} bytes follow the JSON, and no input claims them")
        if request.inputs[0].data is not True or numbers is None:
            raise InvalidTensorError(
                f"input '{INPUT}' has neither a list of numbers as data nor a binary_data_size"
            )
        return Inference(request, np.frombuffer(_parsed(numbers, shape), np.uint8).reshape(shape))
    if numbers is not None:
        raise InvalidTensorError(f"input '{INPUT}' has both data and a binary_data_size")
    if not size == given == math.prod(shape):
        raise InvalidTensorError(
            f"shape {list(shape)} takes {math.prod(shape)} bytes; binary_data_size is {size}, and "
            f"{given} follow the JSON"
        )
    return Inference(request, np.frombuffer(content[length:], np.uint8).reshape(shape))


def encode(
    answer: dict[str, object], tensors: Mapping[str, NDArray[np.float32]], request: InferRequest
) -> tuple[bytes, int | None]:
    """Writes the answer to a request for inference.

    Args:
        answer: its other members: model_name, model_version.
        tensors: what the network said, by name.

    Returns:
        The body, and the length of its JSON if tensors' bytes follow it.
    """
    wanted = request.outputs or [InferOutput(name=name) for name in OUTPUTS]
    described, tails = [], []
    for output in wanted:
        tensor = np.ascontiguousarray(tensors[output.name], "<f4")
        item: dict[str, object] = {"name": output.name, "datatype": "FP32", "shape": tensor.shape}
        binary = output.parameters.binary_data
        if request.parameters.binary_data_output if binary is None else binary:
            item["parameters"] = {"binary_data_size": tensor.nbytes}
            tails.append(tensor.tobytes())
        else:
            item["data"] = tensor.reshape(-1)
        described.append(item)
    if request.id is not None:
        answer = {**answer, "id": request.id}
    header = orjson.dumps({**answer, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([header, *tails]), len(header) if tails else None


def _decompressed(body: Body, limit: Limit) -> bytes | bytearray:
    if body.encoding == "identity":
        return body.content
    if body.encoding not in _WINDOW:
        raise UnsupportedEncodingError(
            f"Content-Encoding may be gzip or deflate, not {body.encoding[:40]!r}."
        )
    stream = zlib.decompressobj(_WINDOW[body.encoding])
    try:
        content = stream.decompress(body.content, limit.bytes + 1)
    except zlib.error as error:
        raise InvalidTensorError(f"the body is no {body.encoding} stream: {error}") from error
    if len(content) > limit.bytes:
        raise UploadTooLargeError(
            f"Decompressed, the body is larger than {limit.bytes:,} bytes, {limit.reason}."
        )
    if not stream.eof or stream.unused_data:
        raise InvalidTensorError(f"the body is not one whole {body.encoding} stream")
    return content


def _header_length(text: str | None, available: int) -> int:
    if text is None:
        return available
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > available:
        raise InvalidTensorError(f"{HEADER_LENGTH} is no number of bytes that the body has")
    return int(text)


def _split(text: bytes) -> tuple[bytes, bytes | None]:
    """Cuts the first list that is called "data" out of JSON text and leaves `true` in its place.

    An unescaped quote before `data": [` can, in JSON, only open that name. The list, if it is
    one of numbers, ends before the next quote or brace.
    """
    at = text.find(b'"data"')
    while at >= 0:
        match = None if text[at - 1 : at] == b"\\" else _DATA.match(text, at)
        if match:
            ends = [text.find(mark, match.end()) for mark in (b'"', b"}")]
            end = min((end for end in ends if end >= 0), default=len(text))
            numbers = text[match.end() : end].rstrip(b" \t\r\n,")
            end = match.end() + len(numbers)
            return b"%b true %b" % (text[: match.end()], text[end:]), numbers
        at = text.find(b'"data"', at + 1)
    return text, None


@functools.lru_cache(maxsize=64)  # clients send the same JSON again and again
def _request(header: bytes) -> InferRequest:
    if len(header) > MAX_HEADER_BYTES:
        raise InvalidTensorError(
            f"the JSON is longer than {MAX_HEADER_BYTES} bytes without the numbers of '{INPUT}'"
        )
    try:
        request = InferRequest.model_validate(orjson.loads(header))
    except orjson.JSONDecodeError as error:
        raise InvalidTensorError(f"the body is not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"]) or "the body"
        raise InvalidTensorError(f"{place}: {first['msg']}") from error
    names = [output.name for output in request.outputs or ()]
    for name in names:
        if name not in OUTPUTS:
            raise InvalidTensorError(
                f"there is no output {name[:40]!r}, only {' and '.join(OUTPUTS)}"
            )
    if len(set(names)) < len(names):
        raise InvalidTensorError("an output is asked for twice")
    return request


def _shape(request: InferRequest, clip_shape: tuple[int, ...], max_clips: int) -> tuple[int, ...]:
    (tensor,) = request.inputs
    if tensor.name != INPUT:
        raise InvalidTensorError(f"there is no input {tensor.name[:40]!r}, only '{INPUT}'")
    if tensor.datatype != DATATYPE:
        raise InvalidTensorError(
            f"input '{INPUT}' has datatype {DATATYPE}, not {tensor.datatype[:40]!r}"
        )
    clips, *rest = tensor.shape or [0]
    if tuple(rest) != clip_shape or clips < 1:
        raise InvalidTensorError(
            f"input '{INPUT}' has shape {[-1, *clip_shape]}, not {list(tensor.shape)}"
        )
    if clips > max_clips:
        raise InvalidTensorError(f"a request may bring {max_clips} clips at most, not {clips}")
    return (clips, *clip_shape)


def _parsed(numbers: bytes, shape: tuple[int, ...]) -> bytearray:
    """JSON lists of 0..255, flat or nested as `shape` says, to bytes.

    Without ever making lists of lists: their structure is compared as text, with the digits out.
    """
    count = math.prod(shape)
    if len(numbers) < 2 * count + 1:  # a digit and a comma each: the claim alone costs nothing
        raise _no_frames(shape)
    flat = re.match(rb"\[[ \t\r\n]*\[", numbers) is None
    bones = _bones((count,) if flat else shape)
    values, at = bytearray(), 0
    try:
        for piece in _pieces(numbers):
            part = piece.translate(None, _NOT_BONES)
            if not bones.startswith(part, at) or len(piece) > 2 * _PIECE:
                raise ValueError("another structure, or a number of a thousand digits")
            at += len(part)
            row = piece.translate(_BRACKETS_TO_SPACES).strip(b" \t\r\n").removesuffix(b",")
            values += bytes(orjson.loads(b"[%b]" % row))
        if at != len(bones):
            raise ValueError("another structure")
    except ValueError as error:  # that of orjson and of bytes() too
        raise _no_frames(shape) from error
    return values


def _no_frames(shape: tuple[int, ...]) -> InvalidTensorError:
    return InvalidTensorError(
        f"the data of '{INPUT}' are not {math.prod(shape)} whole numbers of 0 to 255, flat or "
        f"nested as {list(shape)}"
    )


def _bones(shape: tuple[int, ...]) -> bytes:
    """Nested lists of this shape without their numbers: (2, 3) is `[[,,],[,,]]`."""
    *outer, last = shape
    bones = b"[%b]" % (b"," * (last - 1))
    for count in reversed(outer):
        bones = b"[%b]" % b",".join([bones] * count)
    return bones


def _pieces(numbers: bytes) -> Iterator[bytes]:
    """Cuts after commas."""
    start = 0
    while start < len(numbers):
        end = numbers.find(b",", start + _PIECE)
        end = len(numbers) if end < 0 else end + 1
        yield numbers[start:end]
        start = end
