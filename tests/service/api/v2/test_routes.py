"""`/v2`, the Open Inference Protocol: as tritonclient speaks it, and as nobody should."""

from __future__ import annotations

import asyncio
import gc
import gzip
import re
import threading
import tracemalloc
import weakref
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import tritonclient.http as triton
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from starlette.routing import Match, Route
from tritonclient.utils import InferenceServerException

from export.bundle.bundle import BundleStore
from export.runtime import Outputs, load_runtime
from model.demo import STORE
from service.api.v2.codec import Body, _loads, decode
from service.api.v2.routes import _DECODER, _in_turn
from service.errors import InvalidTensorError, UploadTooLargeError
from service.ingest.uploads import Limit
from service.server.app import create_app
from service.settings import MIB, load_settings
from tests.service.conftest import send
from tests.service.registry.test_models import metric, wait_until

URL = "/v2/models/demo/infer"
BUNDLE = BundleStore(STORE).open("demo")
CLIP = (8, 64, 64, 3)
LENGTH = "Inference-Header-Content-Length"


def random_clips(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *CLIP), np.uint8)


CLIPS = random_clips(2)


@pytest.fixture(scope="module")
def expected() -> Outputs:
    """What the network says of `CLIPS`."""
    return load_runtime(BUNDLE, "cpu").run(CLIPS)


@pytest.fixture
def tritons(client: httpx.Client) -> Iterator[triton.InferenceServerClient]:
    with triton_of(client) as theirs:
        yield theirs


def triton_of(client: httpx.Client) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(
        f"{client.base_url.host}:{client.base_url.port}", concurrency=4
    )


def triton_input(clips: NDArray[np.uint8], *, binary: bool = True) -> list[triton.InferInput]:
    tensor = triton.InferInput("frames", list(clips.shape), "UINT8")
    tensor.set_data_from_numpy(clips, binary_data=binary)
    return [tensor]


def header(**changes: Any) -> dict[str, Any]:
    """The JSON of a request with `CLIPS` in binary, with other members of its input."""
    tensor = {
        "name": "frames",
        "shape": list(CLIPS.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": CLIPS.nbytes},
    }
    return {"inputs": [{**tensor, **changes}]}


def binary(request: Any, tail: bytes = CLIPS.tobytes(), length: Any = None) -> dict[str, Any]:
    """The arguments of a POST with JSON and bytes."""
    text = request if isinstance(request, bytes) else orjson.dumps(request)
    return {
        "content": text + tail,
        "headers": {LENGTH: str(len(text) if length is None else length)},
    }


def in_json(data: Any, clips: int = 1, **members: Any) -> dict[str, Any]:
    """The arguments of a POST with everything in JSON."""
    tensor = {"name": "frames", "shape": [clips, *CLIP], "datatype": "UINT8", "data": data}
    return {"content": orjson.dumps({"inputs": [{**tensor}], **members})}


def error(answer: httpx.Response, status: int, message: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert message in body["error"]
    assert body["error"]


# What tritonclient does.


def test_triton_finds_the_server_and_the_model(tritons: triton.InferenceServerClient) -> None:
    assert tritons.is_server_live()
    assert tritons.is_server_ready()
    assert tritons.is_model_ready("demo")
    assert tritons.is_model_ready("demo", "1")
    assert not tritons.is_model_ready("demo", "2")
    assert not tritons.is_model_ready("other")
    config = BUNDLE.config
    server = tritons.get_server_metadata()
    assert server["name"] == "timesformer"
    assert "binary_tensor_data" in server["extensions"]
    for version in ("", "1"):
        model = tritons.get_model_metadata("demo", version)
        assert model == {
            "name": "demo",
            "versions": ["1"],
            "platform": "onnxruntime",
            "inputs": [{"name": "frames", "datatype": "UINT8", "shape": [-1, *CLIP]}],
            "outputs": [
                {"name": "logits", "datatype": "FP32", "shape": [-1, config.num_classes]},
                {"name": "embedding", "datatype": "FP32", "shape": [-1, config.embed_dim]},
            ],
        }


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
@pytest.mark.parametrize("version", ["", "1"])
def test_triton_gets_what_the_network_says(
    tritons: triton.InferenceServerClient,
    expected: Outputs,
    binary_input: bool,
    binary_output: bool,
    version: str,
) -> None:
    result = tritons.infer(
        "demo",
        triton_input(CLIPS, binary=binary_input),
        version,
        outputs=[
            triton.InferRequestedOutput("embedding", binary_data=binary_output),
            triton.InferRequestedOutput("logits", binary_data=not binary_output),
        ],
        request_id="order 66",
    )
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits, atol=1e-4)
    np.testing.assert_allclose(result.as_numpy("embedding"), expected.embedding, atol=1e-4)
    answer = result.get_response()
    assert [output["name"] for output in answer["outputs"]] == ["embedding", "logits"]
    assert answer["id"] == "order 66"
    assert (answer["model_name"], answer["model_version"]) == ("demo", "1")


def test_triton_that_names_no_outputs_gets_all_in_binary(
    tritons: triton.InferenceServerClient, expected: Outputs
) -> None:
    result = tritons.infer("demo", triton_input(CLIPS))
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits, atol=1e-4)
    np.testing.assert_allclose(result.as_numpy("embedding"), expected.embedding, atol=1e-4)
    assert "data" not in result.get_output("logits")
    assert "id" not in result.get_response()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary_input", [True, False])
def test_triton_may_compress(
    tritons: triton.InferenceServerClient, expected: Outputs, algorithm: str, binary_input: bool
) -> None:
    result = tritons.infer(
        "demo",
        triton_input(CLIPS, binary=binary_input),
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits, atol=1e-4)


def test_triton_sees_our_errors(tritons: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no such model") as caught:
        tritons.infer("other", triton_input(CLIPS))
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="30 clips, the most"):
        tritons.infer("demo", triton_input(random_clips(31)))


# What others do.


@pytest.mark.parametrize("spaces", [None, orjson.OPT_INDENT_2])
def test_json_may_be_flat_or_nested(
    client: httpx.Client, expected: Outputs, spaces: int | None
) -> None:
    for data in (CLIPS.tolist(), CLIPS.reshape(-1).tolist()):
        request = orjson.loads(in_json(data, 2)["content"])
        answer = client.post(URL, content=orjson.dumps(request, option=spaces)).json()
        logits = next(item for item in answer["outputs"] if item["name"] == "logits")
        assert logits["shape"] == list(expected.logits.shape)
        found = np.reshape(logits["data"], logits["shape"])
        np.testing.assert_allclose(found, expected.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "pixels"}, "no input 'pixels'"),
        ({"datatype": "FP32"}, "datatype UINT8"),
        ({"shape": [2, 8, 64, 64]}, "shape [-1, 8, 64, 64, 3]"),
        ({"shape": [2, 8, 64, 3, 64]}, "shape [-1, 8, 64, 64, 3]"),
        ({"shape": [0, *CLIP]}, "shape"),
        ({"shape": [1, *CLIP]}, "takes 98304 bytes"),
        ({"shape": [31, *CLIP]}, "30 clips at most"),
        ({"shape": [2**63, *CLIP]}, "30 clips at most"),
        ({"shape": ["2", *CLIP]}, "inputs.0.shape"),
        ({"shape": [2.0, *CLIP]}, "inputs.0.shape"),
        ({"shape": [1] * 17}, "inputs.0.shape"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size"),
        ({"parameters": {"binary_data_size": CLIPS.nbytes - 1}}, "196608 follow the JSON"),
        ({"parameters": {}}, "no input claims them"),
        ({"parameters": None}, "inputs.0.parameters"),
        ({"data": [1]}, "both data and"),
    ],
)
def test_an_input_that_does_not_fit_is_named(
    client: httpx.Client, changes: dict[str, Any], message: str
) -> None:
    error(client.post(URL, **binary(header(**changes))), 400, message)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": header()["inputs"] * 2}, "inputs"),
        ([], "the body"),
        (b'{"inputs": NaN}', "not JSON"),
        (b"", "not JSON"),
        (b"[" * 5000, "not JSON"),
        ({**header(), "outputs": [{"name": "scores"}]}, "no output 'scores'"),
        ({**header(), "outputs": [{"name": "logits"}] * 2}, "twice"),
        (
            {**header(), "outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
            "classification",
        ),
        ({**header(), "parameters": {"timeout": -1}}, "parameters.timeout"),
        ({**header(), "id": 7}, "id"),
        ({**header(), "note": "x" * 70_000}, "longer than"),
    ],
)
def test_a_request_that_is_malformed_is_told_why(
    client: httpx.Client, request_: Any, message: str
) -> None:
    error(client.post(URL, **binary(request_)), 400, message)


@pytest.mark.parametrize("length", ["-1", "x", "", "1.5", "99999999999999999999", "200000"])
def test_a_wrong_header_length_is_refused(client: httpx.Client, length: str) -> None:
    error(client.post(URL, **binary(header(), length=length)), 400, LENGTH)


FLAT = CLIPS[0].reshape(-1).tolist()


@pytest.mark.parametrize(
    "data",
    [
        [],
        FLAT[:-1],
        [*FLAT, 0],
        [256, *FLAT[1:]],
        [-1, *FLAT[1:]],
        [0.5, *FLAT[1:]],
        [True, *FLAT[1:]],
        [None, *FLAT[1:]],
        ["1", *FLAT[1:]],
        [*FLAT[:-1], [1]],
        [*FLAT[:-1], 2**64 - 1],
        [[]] * len(FLAT),
        CLIPS[0].tolist(),
        [CLIPS[0].reshape(8, 64, 3, 64).tolist()],
        "text",
        7,
        {"a": 1},
    ],
    ids=lambda data: str(data)[:12],
)
def test_json_data_that_are_no_frames_are_refused(client: httpx.Client, data: Any) -> None:
    error(client.post(URL, **in_json(data)), 400, "'frames'")


@pytest.mark.parametrize(
    ("filler", "message"),
    [
        (b"1" * 4_000_000, "not JSON"),
        (b"[],[" * 1_000_000, "more lists than numbers"),
        (b"[" * 4_000_000, "more lists than numbers"),
        (b"[1],[" * 1_000_000, "more lists than numbers"),
        (b"[" * 5_000, "not JSON"),
        (b" " * 4_000_000, "whole numbers"),
        (b"1," * 4_000_000 + b"1", "whole numbers"),
        (b'], "shape": [' + b"1.5," * 1_000_000 + b"1", "inputs.0.shape.0"),
        (b"]}," + b"1," * 1_000_000 + b'{"a": [', "inputs"),
        (b']}], "outputs": [' + b"1," * 1_000_000 + b'{"a": [', "outputs.0"),
        (b"{}," * 2_000_000 + b"1", "more than 1000 objects"),
        (b'], "more": [' + b"[" * 900 + b"]" * 900 + b"," + b"1," * 99_000 + b"1", "whole num"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_hostile_json_is_refused_with_little_memory(filler: bytes, message: str) -> None:
    text = in_json([])["content"].removesuffix(b"]}]}") + filler + b"]}]}"
    tracemalloc.start()
    with pytest.raises(InvalidTensorError, match=message):
        decode(Body(text), CLIP, max_clips=30, limit=Limit(8 * MIB))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 150 * MIB


def test_json_above_8_mib_is_refused_though_binary_may_be_larger() -> None:
    body = Body(b" " * (8 * MIB + 1), header_length=str(8 * MIB + 1))
    with pytest.raises(UploadTooLargeError, match="JSON; send the tensor in binary"):
        decode(body, CLIP, max_clips=30, limit=Limit(40 * MIB))


def test_a_nested_list_of_frames_is_parsed_without_the_garbage_collector() -> None:
    collected: list[str] = []
    text = in_json(random_clips(2).tolist(), 2)["content"]
    gc.callbacks.append(lambda phase, info: collected.append(phase))
    try:
        _loads(text)
    finally:
        gc.callbacks.pop()
    assert gc.isenabled()
    assert not collected


@pytest.mark.parametrize("path", [URL, "/v2/models/demo/versions/1/infer"])
def test_infer_is_answered_by_a_plain_route_before_fastapi(path: str) -> None:
    asked = {"type": "http", "method": "POST", "path": path, "headers": []}
    routes = create_app(load_settings()).routes
    route = next(route for route in routes if route.matches(asked)[0] is Match.FULL)
    assert isinstance(route, Route)
    assert not isinstance(route, APIRoute)


@pytest.mark.parametrize("prefix", ["", "/behind"])
def test_infer_before_the_start_is_a_503_also_under_a_path_prefix(prefix: str) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(load_settings()), root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(prefix + URL)

    answer = asyncio.run(ask())
    assert answer.status_code == 503
    assert "starting" in answer.text


def test_a_refused_inference_has_id_and_headers_and_is_counted_by_its_route(
    client: httpx.Client,
) -> None:
    def counts() -> list[float]:
        text = client.get("/metrics").text
        route = 'method="POST",route="/v2/models/{model}/infer",status="400"'
        names = f"requests_total{{{route}}}", 'rejected_total{code="invalid_tensor"}'
        found = (re.search(f"^timesformer_{re.escape(name)} (.*)$", text, re.M) for name in names)
        return [float(row[1]) if row else 0.0 for row in found]

    before = counts()
    answer = client.post(URL, content=b"{}", headers={"X-Request-ID": "mine"})
    error(answer, 400)
    assert answer.headers["X-Request-ID"] == "mine"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert counts() == [count + 1 for count in before]


def test_an_unknown_model_version_or_path_is_a_404(client: httpx.Client) -> None:
    for path in ("/v2/models/other/infer", "/v2/models/demo/versions/2/infer"):
        error(client.post(path, **binary(header())), 404, "'demo'")
    for path in ("/v2/models/other", "/v2/models/demo/versions/01", "/v2/nowhere"):
        error(client.get(path), 404)
    refused = client.get(URL)
    error(refused, 405)
    assert refused.headers["Allow"] == "POST"


@pytest.mark.parametrize("encode", [gzip.compress, zlib.compress])
def test_a_bomb_is_refused_before_it_unfolds(
    client: httpx.Client, encode: Callable[[bytes], bytes]
) -> None:
    text = orjson.dumps(header())
    bomb = encode(text + bytes(100_000_000))
    encoding = "gzip" if encode is gzip.compress else "deflate"
    for headers in ({LENGTH: str(len(text))}, {}):
        answer = client.post(URL, content=bomb, headers={**headers, "Content-Encoding": encoding})
        error(answer, 413, "Decompressed")


@pytest.mark.parametrize(
    ("encoding", "content", "status"),
    [
        ("br", b"x", 415),
        ("gzip, gzip", b"x", 415),
        ("gzip", b"no gzip", 400),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-4], 400),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", 400),
        ("deflate", b"", 400),
    ],
)
def test_a_body_that_is_not_encoded_as_it_says_is_refused(
    client: httpx.Client, encoding: str, content: bytes, status: int
) -> None:
    error(client.post(URL, content=content, headers={"Content-Encoding": encoding}), status)


def test_more_than_could_be_used_is_refused_unread(client: httpx.Client) -> None:
    cases = (
        ({}, 8 * MIB + 1, b"send the tensor in binary"),
        ({LENGTH: "10"}, 4_000_000, b""),
    )
    for headers, size, hint in cases:
        with send(client, URL, length=size, **headers) as sender:
            received = b""
            while b"}" not in received:
                received += sender.recv(1000)
            assert received.startswith(b"HTTP/1.1 413 ")
            assert hint in received


def test_what_all_requests_hold_in_memory_is_bounded(serve: Any, tmp_path: Path) -> None:
    def held() -> float:
        return metric(client, "timesformer_tensor_bytes")

    sound = binary(header(), bytes(CLIPS.nbytes))
    content, headers = sound["content"], sound["headers"]
    pieces = (content[start : start + 9999] for start in range(0, 200_000, 9999))
    packed = {
        "content": gzip.compress(content),
        "headers": {**headers, "Content-Encoding": "gzip"},
    }
    assert len(packed["content"]) < 10_000, "the decompressed size is what counts"
    with serve(max_tensor_bytes=MIB, spool_dir=tmp_path) as client:
        with send(client, URL, b" " * 900_000, length=950_000):
            wait_until(lambda: held() == 900_000)
            for request in (sound, {"content": pieces, "headers": headers}, packed):
                answer = client.post(URL, **request)
                error(answer, 503, "Too many clips")
                assert int(answer.headers["retry-after"]) >= 1
            assert held() == 900_000
        wait_until(lambda: held() == 0)
        for request in (sound, packed):
            assert client.post(URL, **request).status_code == 200
        assert held() == 0
        error(client.post(URL, content=b" " * (MIB + 1)), 413, "holds in memory")


@pytest.mark.anyio
async def test_a_body_that_nobody_waits_for_any_more_is_let_go() -> None:
    class Content:
        """Something that is seen to go."""

    gate = threading.Event()
    _DECODER.submit(gate.wait)
    content = Content()
    seen = weakref.ref(content)
    waiting = asyncio.create_task(_in_turn(partial(lambda content: content, content)))
    del content
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    del waiting
    gc.collect()
    left = seen()
    gate.set()
    assert left is None


def test_a_shape_that_is_only_claimed_costs_no_memory() -> None:
    clip = (8, 224, 224, 3)
    text = in_json([1])["content"].replace(orjson.dumps([1, *CLIP]), orjson.dumps([30, *clip]))
    for data in (b"[1]", b"[[1]]"):
        body = Body(text.replace(b"[1]}", data + b"}"))
        assert body.is_quick
        tracemalloc.start()
        with pytest.raises(InvalidTensorError, match="whole numbers"):
            decode(body, clip, max_clips=30, limit=Limit(MIB))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < MIB


def test_a_request_may_give_itself_a_time(client: httpx.Client) -> None:
    """In microseconds; a hundred are not enough for a network, a minute is."""
    hasty, patient = ({**header(), "parameters": {"timeout": time}} for time in (100, 60_000_000))
    error(client.post(URL, **binary(hasty)), 504, "time that was given")
    assert client.post(URL, **binary(patient)).status_code == 200
    assert client.get("/health/ready").status_code == 200


def test_a_defect_of_ours_is_an_error_in_the_protocols_form(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("service.api.v2.routes.encode", broken)
    answer = client.post(URL, **binary(header()))
    error(answer, 500)
    assert "secret" not in answer.text


def test_its_description_is_whole(client: httpx.Client) -> None:
    text = client.get("/openapi.json").text
    paths = orjson.loads(text)["paths"]
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        infer = paths[f"{base}/infer"]["post"]
        named = {item["name"] for item in infer["parameters"] if item["in"] == "path"}
        assert named == {"model", "version"} if "version" in base else {"model"}
        for content in (infer["requestBody"]["content"], infer["responses"]["200"]["content"]):
            assert set(content) == {"application/json", "application/octet-stream"}
        assert {"400", "404", "408", "413", "415", "503", "504"} <= set(infer["responses"])
        assert "404" in paths[base]["get"]["responses"]
        assert "404" in paths[f"{base}/ready"]["get"]["responses"]
    assert "$defs" not in text


SOUND = orjson.dumps({**header(), "id": "x", "parameters": {"timeout": 60_000_000}})


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    """A sound request with bytes flipped, cut out or spliced in, and perhaps another length."""
    start = draw(st.sampled_from([SOUND, in_json(FLAT)["content"]]))
    json_only = start is not SOUND
    text = bytearray(start)
    for _ in range(draw(st.integers(0, 4))):
        # Mostly where the structure is.
        at = draw(st.integers(0, min(len(text), 300)) | st.integers(0, len(text)))
        end = at + draw(st.integers(0, 9))
        text[at:end] = draw(
            st.binary(max_size=9) | st.sampled_from([b'"', b"[", b"}", b"1e9", b","])
        )
    headers = {}
    if draw(st.booleans()) or not json_only:
        headers[LENGTH] = str(draw(st.just(len(text)) | st.integers(-5, 300_000)))
    tail = draw(st.sampled_from([b"" if json_only else CLIPS.tobytes(), b"", CLIPS.tobytes()[1:]]))
    content = bytes(text) + tail
    encoding = draw(st.sampled_from([None, None, "gzip", "deflate", "identity", "zip"]))
    if encoding is not None:
        headers["Content-Encoding"] = encoding
        pack = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding, bytes)
        content = draw(st.sampled_from([pack(content), content]))
    return content, headers


@settings(max_examples=60)
@given(mutated())
def test_a_mutated_request_gets_an_answer_or_a_client_error(
    client: httpx.Client, mutant: tuple[bytes, dict[str, str]]
) -> None:
    content, headers = mutant
    answer = client.post(URL, content=content, headers=headers)
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]
