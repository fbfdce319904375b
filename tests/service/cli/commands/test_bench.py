"""`timesformer bench`: what it prints, on the demo bundle."""

from __future__ import annotations

import json
import re

from click.testing import CliRunner, Result

from export.bundle.manifest import ONNX_FLOAT32
from service.cli.main import cli

QUICK = ("--device", "cpu", "--threads", 1, "--rounds", 1, "--batches", "1,3")


def timesformer(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["bench", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_table_has_a_row_an_engine_and_batch() -> None:
    lines = timesformer("demo", *QUICK).stdout.splitlines()
    assert lines[0] == f"demo version 1; speed-up over {ONNX_FLOAT32}, CPUExecutionProvider"
    columns, *rows = (re.split(r"\s{2,}", line.strip()) for line in lines[1:4])
    assert columns[:3] == ["engine", "batch", "p50 ms"]
    assert [row[1] for row in rows] == ["1", "3"]
    assert all(len(row) == len(columns) for row in rows)


def test_json_has_what_a_program_needs_and_nothing_else_is_printed() -> None:
    answer = timesformer("demo", *QUICK, "--json")
    facts = json.loads(answer.stdout)
    assert answer.stderr == ""
    first = facts["engines"][0]
    assert first.keys() >= {"engine", "batch", "timing", "speed_up", "off_by"}
    assert first["timing"].keys() >= {"p50_ms", "p90_ms", "p99_ms", "clips_per_second"}


def test_what_cannot_be_measured_is_an_error() -> None:
    wrong = timesformer("demo", *QUICK, "--precision", "int8", code=1)
    assert "in that precision can run here" in wrong.stderr
    assert "rising sizes" in timesformer("demo", "--batches", "4,1", code=2).stderr
