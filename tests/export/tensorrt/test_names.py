"""Every TensorRT name in our code is in TensorRT 11.4, as `api-11.4.md` lists it.

The code is read, not run: with the real bindings only a GPU machine would tell. Variables stand for
TensorRT's classes by their names, so that each name has one meaning in the files read here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.runtime import tensorrt as runtime
from export.tensorrt import build_cache as reuse
from export.tensorrt import builder
from tests.conftest import SHARED

CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "layer": "ILayer",
    "tensor": "ITensor",
    "profile": "IOptimizationProfile",
    "parser": "OnnxParser",
    "error": "ParserError",
    "cache": "ITimingCache",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "inspector": "EngineInspector",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
# The same variable name in another function is another class.
ELSEWHERE = {
    "refit": {"config": "ISerializationConfig", "parser": "OnnxParserRefitter"},
    "main": {"error": None},
    "made": {"error": None},
    "_kind": {"layer": None},
    "load_tensorrt": {"error": None},
}


class Api:
    """What `api-11.4.md` says."""

    def __init__(self, text: str) -> None:
        names = re.search(r"^Top-level names: (.*)$", text, re.MULTILINE)
        assert names is not None
        self.names = set(names.group(1).replace(",", " ").split())
        self.enums = {
            name: set(re.findall(r"(\w+)=-?\d+", members))
            for name, members in re.findall(r"^## enum (\w+) *\n(.*)$", text, re.MULTILINE)
        }
        self.classes = {
            name: set(re.findall(r"^- (?:\d+\. )?(\w+)", body, re.MULTILINE))
            for name, body in re.findall(r"^## class (\w+)\n(.*?)(?=^##|\Z)", text, re.M | re.S)
        }


def unknown(source: str, api: Api) -> Iterator[str]:
    """TensorRT names in the source that the list does not have."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        classes = {**CLASSES, **ELSEWHERE.get(function.name, {})}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute):
                yield from _unknown(node, classes, api)


def _unknown(node: ast.Attribute, classes: dict[str, str | None], api: Api) -> Iterator[str]:
    of = ast.unparse(node.value).replace("self._trt", "trt")
    if of == "trt" and not node.attr.startswith("__"):
        if node.attr not in api.names:
            yield f"trt.{node.attr}"
    elif of.removeprefix("trt.") in api.enums and of.startswith("trt."):
        if node.attr not in api.enums[of.removeprefix("trt.")]:
            yield f"{of}.{node.attr}"
    elif (known := classes.get(of.removeprefix("self._"))) and not node.attr.startswith("__"):
        extra = {"op"} if known == "ILayer" else set()  # of the layer's own class
        if node.attr not in api.classes[known] | extra:
            yield f"{known}.{node.attr}"


@pytest.fixture(scope="module")
def api() -> Api:
    path = SHARED / "tensorrt" / "api-11.4.md"
    if not path.is_file():
        pytest.skip("the list of TensorRT's names is not here")
    return Api(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", [builder, reuse, runtime])
def test_every_name_that_we_use_is_in_tensorrt(module: object, api: Api) -> None:
    source = Path(str(getattr(module, "__file__", ""))).read_text(encoding="utf-8")
    assert "trt." in source
    assert list(dict.fromkeys(unknown(source, api))) == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("trt.BuilderFlag.FP16", "trt.BuilderFlag.FP16"),
        ("self._trt.Bilder(log)", "trt.Bilder"),
        ("config.set_flagg(1)", "IBuilderConfig.set_flagg"),
        ("self._engine.device_memory_size", "ICudaEngine.device_memory_size"),
    ],
)
def test_a_wrong_name_would_be_found(line: str, wrong: str, api: Api) -> None:
    assert list(unknown(f"def f(trt, config, log):\n    {line}\n", api)) == [wrong]
