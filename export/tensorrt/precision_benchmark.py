"""Which precision of a bundle is fastest on a GPU: measured there, on plans that were proven.

The export can only go by the rates that makers state; what a plan makes of a graph may differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime

from export.benchmark.timing import Entrant, take_turns, timing
from export.bundle.bundle import Bundle
from export.runtime.interface import RuntimeUnavailableError
from export.runtime.plans import (
    Fastest,
    Plan,
    PlanError,
    fastest_file,
    graphs_of,
    locked,
    write_whole,
)
from export.runtime.tensorrt import TensorRt
from export.verification.engine_check import Proof, prove_or_close

_ROUNDS = 10


def measure_fastest(
    bundle: Bundle,
    gpu: TensorRt,
    batches: tuple[int, ...],
    batch: int,
    build: Callable[[str], Plan],
    *,
    rounds: int = _ROUNDS,
    report: Callable[[str], None] = lambda step: None,
) -> Fastest:
    """Loads a plan of each precision, compares its answers, and times those that hold, in turns.

    The result lies beside the plans, where `auto` finds it.

    Args:
        batch: clips at a time: as many as the service will run.
        build: gives the plan of a precision; a `PlanError` leaves that precision out.

    Raises:
        PlanError: no precision is left, or the result cannot be written.
    """
    graphs = graphs_of(bundle)
    refused: dict[str, str] = {}
    report("computing the float32 answers")
    proof = Proof.of(bundle)
    with contextlib.ExitStack() as held:
        entrants = []
        for precision in graphs:
            report(f"proving {precision}")
            try:
                runtime = gpu.load(build(precision), batches[-1])
                prove_or_close([runtime], proof)
            except (PlanError, RuntimeUnavailableError) as error:
                refused[precision] = str(error)
                continue
            held.callback(runtime.close)
            entrants.append(Entrant(precision, runtime.run, None))
        if not entrants:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise PlanError(f"bundle {bundle.name} has no plan that can serve here: {reasons}")
        turns = take_turns(entrants, proof.clips, [batch], rounds, report=report)
    wanted = gpu.wanted(bundle, entrants[0].name, batches)
    found = Fastest(
        gpu=wanted.key.gpu,
        compute_capability=wanted.key.compute_capability,
        tensorrt=wanted.key.tensorrt,
        graphs=graphs,
        batch=batch,
        milliseconds={
            each.name: round(timing(turns[each.name, batch], batch, None).p50_ms / batch, 4)
            for each in entrants
        },
        refused=refused,
        created=datetime.now(UTC),
    )
    path = fastest_file(wanted.folder, wanted.key)
    with locked(path):
        write_whole(path, (found.model_dump_json(indent=2) + "\n").encode())
    return found
