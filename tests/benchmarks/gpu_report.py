"""The report of `tests/benchmarks/gpu.py`: a file that each step adds to, its tables, its goals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.gpu_bench import DTYPES
from tests.benchmarks.gpu_networks import (
    COMPILED_ORIGINALS,
    GRAPHS,
    ONNX_RUNTIME,
    ORIGINAL_COMPILED,
)

GOAL_BATCH, GOAL_SHARE, GOAL_SPEED_UP = 32, 0.55, 1.5
OURS = "rewritten"
# Figures of two machines, networks or states of the code are no one report.
_SAME = ("kind", "device", "driver", "torch", "cuda", "commit", "variant", "dtype", "backend")

Row = dict[str, Any]


class ReportError(ValueError):
    """The file cannot be gone on with; the message says what to do."""


class Goal(NamedTuple):
    goal: str
    state: str
    """`met`, `not met` or `not measured`."""
    detail: str


class Report:
    """What was measured so far, in a file if one is named, which is whole at any moment.

    Args:
        path: gone on with if it is there.
        machine: what the figures depend on.

    Raises:
        ReportError: the file is no report, or one of another machine or commit.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any]) -> None:
        self._path = path
        self.content: dict[str, Any] = {
            "machine": machine,
            "done": {},
            "began": [],
            "parity": [],
            "inference": [],
            "training": [],
            "left_out": {},
            "goals": [],
        }
        if path is not None and path.exists():
            self._go_on(path)

    def _go_on(self, path: Path) -> None:
        try:
            found = json.loads(path.read_bytes())
            before = found["machine"]
            if missing := self.content.keys() - found.keys():
                raise KeyError(*missing)
        except (ValueError, TypeError, KeyError) as error:
            raise ReportError(f"{path} is no report of this script: name another file") from error
        now = self.content["machine"]
        for key in _SAME:
            if before.get(key) != now[key]:
                raise ReportError(
                    f"{path} is of {key} {before.get(key)}, and here is {now[key]}: "
                    "name another file, or remove this one"
                )
        self.content = {**found, "machine": now}

    @property
    def done(self) -> dict[str, float]:
        """Seconds of each step that came to its end."""
        done: dict[str, float] = self.content["done"]
        return done

    @property
    def began(self) -> list[str]:
        """Steps that began and did not come to their end."""
        began: list[str] = self.content["began"]
        return began

    def begin(self, step: str) -> None:
        self.done.pop(step, None)
        self.content["left_out"].pop(step, None)
        self.content["began"] = [*(each for each in self.began if each != step), step]
        self._write()

    def end(
        self, step: str, section: str, rows: list[Row], left_out: dict[str, str], seconds: float
    ) -> None:
        """Adds a step's rows, in the place of earlier ones of the same entrant and batch."""
        new = {_key(row) for row in rows}
        kept = [row for row in self.content[section] if _key(row) not in new]
        self.content[section] = [*kept, *rows]
        if left_out:
            self.content["left_out"][step] = left_out
        self.done[step] = round(seconds, 1)
        self.began.remove(step)
        self.content["goals"] = [goal._asdict() for goal in judge(self.content)]
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f".{self._path.name}.new")
        beside.write_text(json.dumps(self.content, indent=2, allow_nan=False) + "\n")
        beside.replace(self._path)


def _key(row: Row) -> tuple[Any, ...]:
    return row["entrant"], row["batch"]


def tables(content: dict[str, Any]) -> Iterable[str]:
    """Lines for a person."""
    if content["parity"]:
        yield "\nparity of the rewritten network with the original in float32"
    for row in content["parity"]:
        yield f"  {row['entrant']:8s} {_agreement(row)}"
    if content["inference"]:
        yield (
            f"\ninference, {content['machine']['dtype']}: ms a batch, clips/s, share of the rate "
            "of one large product (quartiles), time of its products alone as a share of its own, "
            f"speed-up over {ORIGINAL_COMPILED!r}, answers"
        )
        yield _limit(content["inference"])
    for row in sorted(content["inference"], key=lambda row: row["batch"]):
        yardstick = _find(content, ORIGINAL_COMPILED, row["batch"])
        ratio = speed_up(row, yardstick) if yardstick else None
        yield (
            f"  {row['batch']:3d} {row['entrant']:60s} {row['milliseconds']:9.3f} "
            f"{row['clips_per_second']:9.1f} {_quartiles(row['share_of_large'])} "
            f"{_quartiles(row['share_of_own_products'])} "
            f"{f'{ratio:6.2f}' if ratio else '     -'}  {_agreement(row)}"
        )
    if content["training"]:
        yield (
            "\ntraining, bf16: ms a step, clips/s, share of the rate of one large product "
            "(quartiles), memory"
        )
        yield _limit(content["training"])
    for row in content["training"]:
        held = row["peak_bytes"]
        yield (
            f"  {row['batch']:3d} {row['entrant']:26s} {row['milliseconds']:9.2f} "
            f"{row['clips_per_second']:9.2f} {_quartiles(row['utilisation'])} "
            f"{f'{held / 2**30:.1f} GiB' if held else '-'}"
        )
    yield "\ngoals"
    for goal in judge(content):
        yield f"  {goal.state:12s} {goal.goal}: {goal.detail}"
    for step, reasons in content["left_out"].items():
        for what, reason in reasons.items():
            yield f"  left out     {step}: {what}: {reason}"


def _limit(rows: list[Row]) -> str:
    rate = statistics.median(row["limit"] for row in rows)
    return f"  one large product: {rate / 1e12:.3f} T multiply-adds a second"


def _quartiles(shares: list[float] | None) -> str:
    if shares is None:
        return f"{'-':>17s}"
    low, median, high = shares
    return f"{median:6.1%} ({low:.0%}, {high:.0%})"


def _agreement(row: Row) -> str:
    if row["cosine"] is None:
        return "WRONG: not finite"
    verdict = "right" if row["passed"] else "WRONG"
    return f"{verdict}: cosine {row['cosine']:.6f}, error {row['error']:.1e}"


def _find(content: dict[str, Any], entrant: str, batch: int) -> Row | None:
    return next((row for row in content["inference"] if _key(row) == (entrant, batch)), None)


def speed_up(row: Row, over: Row) -> float:
    """By what both are of the large product, which took its turn beside either: steps of different
    minutes, or of different runs, may be compared."""
    return float(row["share_of_large"][1] / over["share_of_large"][1])


def judge(content: dict[str, Any]) -> list[Goal]:
    """Each goal: met, not met or not measured. Those of speed are of `base` in FP16 on a GPU, and
    only rows whose answers are right count."""
    machine = content["machine"]
    at_batch = [row for row in content["inference"] if row["batch"] == GOAL_BATCH]
    if (machine["variant"], machine["dtype"]) != ("base", "fp16") or machine["kind"] != "cuda":
        at_batch = []
    rows = {row["entrant"]: row for row in at_batch if row["passed"]}
    wrong = [row["entrant"] for row in at_batch if not row["passed"]]
    best = _best(row for name, row in rows.items() if name.startswith(OURS))
    return [
        _parity_goal(content["parity"]),
        _share_goal(best, wrong),
        _speed_goal(
            f"at least {GOAL_SPEED_UP} times torch.compile of the original, batch {GOAL_BATCH}",
            best,
            _best(rows[name] for name in COMPILED_ORIGINALS if name in rows),
            GOAL_SPEED_UP,
            wrong,
        ),
        _speed_goal(
            f"PyTorch with CUDA graphs as fast as ONNX Runtime or faster, batch {GOAL_BATCH}",
            _best(rows[name] for name in GRAPHS if name in rows),
            rows.get(ONNX_RUNTIME),
            1.0,
            wrong,
        ),
    ]


def _best(rows: Iterable[Row]) -> Row | None:
    return max(rows, key=lambda row: float(row["share_of_large"][1]), default=None)


def _parity_goal(rows: list[Row]) -> Goal:
    title = "answers of the rewritten network in 16 bits are those of the original in float32"
    if len(rows) < 1 + len(DTYPES):
        return Goal(title, "not measured", "a precision did not run")
    wrong = [row["entrant"] for row in rows if not row["passed"]]
    return _goal(title, not wrong, f"off in {', '.join(wrong)}" if wrong else "within the limits")


def _share_goal(best: Row | None, wrong: list[str]) -> Goal:
    title = f"FP16 base at batch {GOAL_BATCH} above {GOAL_SHARE:.0%} of the limit of large products"
    if best is None:
        return Goal(title, "not measured", _why(wrong))
    share = best["share_of_large"][1]
    return _goal(title, share > GOAL_SHARE, f"{share:.1%}, {best['entrant']}")


def _speed_goal(
    title: str, row: Row | None, over: Row | None, least: float, wrong: list[str]
) -> Goal:
    if row is None or over is None:
        return Goal(title, "not measured", _why(wrong))
    ratio = speed_up(row, over)
    detail = f"{ratio:.2f}: {row['entrant']} over {over['entrant']}"
    return _goal(title, ratio >= least, detail)


def _why(wrong: list[str]) -> str:
    if wrong:
        return f"answers are wrong: {'; '.join(wrong)}"
    return f"wants base in FP16 on a GPU at batch {GOAL_BATCH}, with right answers"


def _goal(title: str, met: bool, detail: str) -> Goal:
    return Goal(title, "met" if met else "not met", detail)
