"""Problem documents, and schemas as OpenAPI wants them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from service.inference.parameters import Schema


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model with its definitions in place: `#/$defs` in the middle of an
    OpenAPI document would lead nowhere.
    """
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        target = definitions.get(node.get("$ref", "").removeprefix("#/$defs/"), {})
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return {key: inline(value) for key, value in {**target, **rest}.items()}

    inlined: dict[str, Any] = inline(schema)
    return inlined


class FieldProblem(Schema):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details. `code` is stable and for programs, `detail` is for people."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None = None
    errors: list[FieldProblem] | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Unprocessable Entity",
                    "status": 422,
                    "code": "no_video_stream",
                    "detail": "The file has no video stream.",
                    "request_id": "8c1f6a7e5d0b4f0f9a52a3f2c1d0e9b8",
                }
            ]
        }
    )
