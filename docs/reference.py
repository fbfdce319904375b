"""`docs/reference.md`, made from the definitions in the code: `python -m docs.reference`.

Settings, commands, endpoints, error codes and metrics each stand in one place; this turns them
into the page, and a test holds the page to them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
from pydantic.fields import FieldInfo

from service.cli import main
from service.errors import codes
from service.observability.metrics import Metrics
from service.server.app import create_app
from service.settings import ENV_PREFIX, Settings


def reference() -> str:
    """The page, in Markdown."""
    sections = [
        "# Reference",
        "Made from the code by `make docs`; do not edit.",
        *_settings(),
        *_commands(),
        *_endpoints(),
        *_errors(),
        *_metrics(),
    ]
    return "\n\n".join(sections) + "\n"


def _settings() -> Iterator[str]:
    yield "## Settings"
    yield (
        "Each is an environment variable and a flag of `timesformer serve`: "
        f"`{ENV_PREFIX}PORT` is `--port`. The flag wins."
    )
    rows = [
        [f"`{ENV_PREFIX}{name.upper()}`", _default(name, field), field.description or ""]
        for name, field in Settings.model_fields.items()
    ]
    yield _table(["variable", "default", "meaning"], rows)


def _default(name: str, field: FieldInfo) -> str:
    computed = {"decode_workers": "one per core, two at least", "spool_dir": "the system's"}
    if name in computed:
        return computed[name]
    return "" if field.default is None else f"`{field.default}`"


def _commands() -> Iterator[str]:
    yield "## Commands"
    yield "Exit codes: " + (main.__doc__ or "").split("Exit codes: ")[1].strip().replace("\n", " ")
    for path, command in _walk(main.cli, "timesformer"):
        if path == "timesformer serve":
            yield f"### `{path}`\n\n{command.help} A flag for each setting, see above."
            continue
        usage = " ".join(
            parameter.make_metavar(click.Context(command))
            for parameter in command.params
            if isinstance(parameter, click.Argument)
        )
        yield f"### `{' '.join(filter(None, [path, usage]))}`\n\n{_paragraphs(command.help)}"
        options = [item for item in command.params if isinstance(item, click.Option)]
        if options:
            yield _table(
                ["option", "meaning"],
                [[f"`{', '.join(item.opts)}`", item.help or ""] for item in options],
            )


def _walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if command is not main.cli:
        yield path, command
    if isinstance(command, click.Group):
        for name, child in sorted(command.commands.items()):
            yield from _walk(child, f"{path} {name}")


def _paragraphs(text: str | None) -> str:
    return "\n".join(line.strip() for line in (text or "").splitlines()).strip()


def _endpoints() -> Iterator[str]:
    yield "## Endpoints"
    yield "The full description, with schemas and examples, is served at `/openapi.json`."
    description = create_app(Settings.model_construct()).openapi()
    rows = [
        [f"`{method.upper()} {path}`", operation["summary"], _parameters(operation)]
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    yield _table(["endpoint", "purpose", "parameters"], rows)
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parameters = _query_parameters(operation)
            if parameters:
                form = "multipart/form-data" in operation.get("requestBody", {}).get("content", {})
                place = "in the query or in the form" if form else "in the query"
                yield f"Parameters of `{method.upper()} {path}`, {place}:"
                yield _table(
                    ["name", "default", "meaning"],
                    [
                        [
                            f"`{item['name']}`",
                            f"`{item['schema'].get('default', '')}`",
                            item.get("description", ""),
                        ]
                        for item in parameters
                    ],
                )


def _parameters(operation: dict[str, Any]) -> str:
    return ", ".join(f"`{item['name']}`" for item in _query_parameters(operation))


def _query_parameters(operation: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in operation.get("parameters", []) if item["in"] == "query"]


def _errors() -> Iterator[str]:
    yield "## Error codes"
    yield (
        "Errors are `application/problem+json` (RFC 9457) with a stable `code`; "
        '`detail` is a sentence for people. Under `/v2` they are `{"error": "..."}`, as the Open '
        "Inference Protocol has it, and the code is in the metrics only."
    )
    rows = [[f"`{code}`", str(status)] for code, status in codes().items()]
    yield _table(["code", "status"], sorted(rows, key=lambda row: (row[1], row[0])))


def _metrics() -> Iterator[str]:
    yield "## Metrics"
    rows = []
    for metric in Metrics().registry.collect():
        if metric.name.startswith("timesformer_"):
            suffix = "_total" if metric.type == "counter" else ""
            rows.append([f"`{metric.name}{suffix}`", metric.type, metric.documentation])
    yield _table(["metric", "type", "meaning"], rows)
    yield "The process's own (`process_*`, `python_info`) come with them."


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )


if __name__ == "__main__":
    sys.stdout.write(reference())
