"""Log lines: one object a line for machines, one readable line for people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from service.observability.logs import JsonFormatter, TextFormatter, configure, request_id


@pytest.fixture
def in_a_request() -> Iterator[None]:
    token = request_id.set("order-66")
    yield
    request_id.reset(token)


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "service.x", "levelno": 30, "levelname": "WARNING"})
    made.msg, made.args = message, args
    vars(made).update(fields)
    return made


@pytest.mark.usefixtures("in_a_request")
def test_a_json_line_has_the_message_the_request_and_the_extras() -> None:
    line = JsonFormatter().format(record("took %d ms\nor so", 7, clips=3, color_message="red"))
    assert "\n" not in line
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "warning",
        "logger": "service.x",
        "message": "took 7 ms\nor so",
        "request_id": "order-66",
        "clips": 3,
    }


def test_a_text_line_reads_from_left_to_right() -> None:
    line = TextFormatter().format(record("swapped", to="2"))
    assert line.endswith("warning swapped to=2")


def test_an_exception_comes_with_its_traceback_in_both() -> None:
    try:
        raise ZeroDivisionError("by nothing")
    except ZeroDivisionError:
        broken = record("broke", exc_info=sys.exc_info())
    assert "by nothing" in json.loads(JsonFormatter().format(broken))["exception"]
    assert TextFormatter().format(broken).splitlines()[-1] == "ZeroDivisionError: by nothing"


def test_what_json_cannot_hold_is_written_as_text() -> None:
    assert json.loads(JsonFormatter().format(record("x", path=object)))["path"] == str(object)


@pytest.mark.parametrize("style", ["json", "text"])
def test_all_loggers_write_to_stderr_in_the_chosen_style(
    style: str, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure("info", style)  # type: ignore[arg-type]
        logging.getLogger("uvicorn.error").info("started")
        logging.getLogger("service").debug("too quiet")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("uvicorn.access").disabled = False
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "started" in captured.err
    assert "too quiet" not in captured.err
    assert captured.err.startswith("{") is (style == "json")
