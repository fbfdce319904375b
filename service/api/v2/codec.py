"""Open Inference Protocol bodies: JSON with tensors in it, or JSON and then the tensors' bytes.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and Triton's
extensions "binary tensor data" and "http compression". Bytes in, clips out; arrays in, bytes out.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from service.api.v2.schemas import InferOutput, InferRequest
from service.errors import InvalidTensorError, UnsupportedEncodingError, UploadTooLargeError
from service.ingest.uploads import Limit
from service.settings import MIB

HEADER_LENGTH = "Inference-Header-Content-Length"
INPUT, DATATYPE = "frames", "UINT8"
OUTPUTS = ("logits", "embedding")
MAX_HEADER_BYTES = 64 * 1024
"""Limit of JSON that a tensor's bytes follow."""
MAX_JSON_BYTES = 8 * MIB
"""Limit of a request's JSON. The parser blocks all threads until it is done, for up to 0.2 s, and
takes up to 150 MB."""
_MAX_OBJECTS = 1000
_PIECE = 64 * 1024
"""Numbers that are checked between two turns of other threads: a millisecond."""
_IN_BINARY = (
    f"the limit of JSON; send the tensor in binary, with the JSON's length in {HEADER_LENGTH}"
)
_WINDOW = {"gzip": 31, "deflate": 15}  # deflate is the zlib format, RFC 9110 section 8.4.1.2


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
        own = Limit(MAX_JSON_BYTES, _IN_BINARY)
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
    text, tail = bytes(content[:length]), content[length:]
    request, data = (_parsed_header(text), None) if tail else _parsed(text)
    shape = _shape(request, clip_shape, max_clips)
    size = request.inputs[0].parameters.binary_data_size
    if size is None:
        if tail:
            raise InvalidTensorError(f"{len(tail)} bytes follow the JSON, and no input claims them")
        if not isinstance(data, list):
            raise InvalidTensorError(
                f"input '{INPUT}' has neither a list of numbers as data nor a binary_data_size"
            )
        return Inference(request, np.frombuffer(_values(data, shape), np.uint8).reshape(shape))
    if data is not None:
        raise _both()
    if not size == len(tail) == math.prod(shape):
        raise InvalidTensorError(
            f"shape {list(shape)} takes {math.prod(shape)} bytes; binary_data_size is {size}, and "
            f"{len(tail)} follow the JSON"
        )
    return Inference(request, np.frombuffer(tail, np.uint8).reshape(shape))


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


@functools.lru_cache(maxsize=64)  # clients send the same JSON again and again
def _parsed_header(text: bytes) -> InferRequest:
    """Parses JSON that a tensor's bytes follow."""
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidTensorError(f"JSON before bytes is longer than {MAX_HEADER_BYTES} bytes")
    request, data = _parsed(text)
    if data is not None:
        raise _both()
    return request


def _parsed(text: bytes) -> tuple[InferRequest, object]:
    """Parses a request's JSON; returns the request, and apart from it the data of its input."""
    if len(text) > MAX_JSON_BYTES:
        size = f"{MAX_JSON_BYTES / MIB:,.2f} MiB"
        raise UploadTooLargeError(f"The JSON is larger than {size}, {_IN_BINARY}.")
    # A pixel is a list with two commas. Lists with fewer numbers, and objects, would cost more
    # memory and time than frames do.
    if text.count(b"[") > text.count(b",") // 2 + MAX_HEADER_BYTES // 2:
        raise InvalidTensorError(f"the data of '{INPUT}' are more lists than numbers")
    if text.count(b"{") > _MAX_OBJECTS:
        raise InvalidTensorError(f"the JSON has more than {_MAX_OBJECTS} objects")
    try:
        content = _loads(text)
        data = _without_data(content)
        request = InferRequest.model_validate(content)
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
    return request, data


def _loads(text: bytes) -> object:
    """Parses JSON. The garbage collector pauses meanwhile: it would look at a million lists again
    and again, which takes four times as long as the parser (8 MiB: 0.8 s instead of 0.2 s).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(text)
    finally:
        if enabled:
            gc.enable()


def _without_data(content: object) -> object:
    """Cuts the data out of the first input, and returns it."""
    inputs = content.get("inputs") if isinstance(content, dict) else None
    first = inputs[0] if isinstance(inputs, list) and inputs else None
    return first.pop("data", None) if isinstance(first, dict) else None


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


def _values(data: list[Any], shape: tuple[int, ...]) -> bytearray:
    """Returns the bytes of whole numbers of 0 to 255, in a flat list or nested as `shape` says."""
    rows = [data]
    if data and isinstance(data[0], list):
        for size in shape[:-1]:
            if not all(isinstance(row, list) and len(row) == size for row in rows):
                raise _no_frames(shape)
            rows = list(itertools.chain.from_iterable(rows))
        if not all(isinstance(row, list) and len(row) == shape[-1] for row in rows):
            raise _no_frames(shape)
    numbers = list(itertools.chain.from_iterable(rows)) if len(rows) > 1 else rows[0]
    if len(numbers) != math.prod(shape):
        raise _no_frames(shape)
    values = bytearray()
    for start in range(0, len(numbers), _PIECE):
        piece = numbers[start : start + _PIECE]
        try:
            values += bytes(piece)
        except (TypeError, ValueError) as error:
            raise _no_frames(shape) from error
        if set(map(type, piece)) != {int}:  # true and false count as numbers
            raise _no_frames(shape)
    return values


def _no_frames(shape: tuple[int, ...]) -> InvalidTensorError:
    return InvalidTensorError(
        f"the data of '{INPUT}' are not {math.prod(shape)} whole numbers of 0 to 255, flat or "
        f"nested as {list(shape)}"
    )


def _both() -> InvalidTensorError:
    return InvalidTensorError(f"input '{INPUT}' has both data and a binary_data_size")
