"""A whole run: what is left to do, done on this machine or a cluster, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from export.bundle.bundle import Bundle
from service.inference.parameters import ClassifyParameters
from service.observability.progress import bar
from service.offline.errors import LabellingError
from service.offline.local_runner import label_here
from service.offline.rows import Row, Rules
from service.offline.table import LabelTable
from service.registry.loading import find_bundle
from service.settings import Settings

Label = Callable[
    [
        Mapping[str, str],
        Bundle,
        ClassifyParameters,
        Settings,
        Callable[[Row], None],
        Callable[[str], None],
    ],
    None,
]
"""As `label_here`."""


class Output(NamedTuple):
    """Where the table goes, and how it is written."""

    path: Path
    block: int
    again: bool


class Summary(NamedTuple):
    """What was done, and how fast."""

    videos: int
    """in the table, with those of earlier runs"""
    failed: int
    """of them, without labels"""
    labelled: int
    """by this run, failed ones among them"""
    seconds: float
    """of this run, from the first video on"""
    clips: int
    """through the network, in this run"""

    @property
    def videos_per_second(self) -> float:
        return self.labelled / self.seconds if self.seconds else 0.0

    def cost_per_thousand(self, cost_per_hour: float) -> float | None:
        """What a thousand videos cost at a price of the hour, in its currency; loading aside."""
        if not self.labelled:
            return None
        return cost_per_hour * self.seconds / 3600 / self.labelled * 1000


def label_archive(
    videos: Mapping[str, str],
    output: Output,
    settings: Settings,
    parameters: ClassifyParameters,
    label: Label = label_here,
    *,
    say: Callable[[str], None] = lambda line: None,
    quiet: bool = False,
) -> Summary:
    """Labels the videos that the table does not have yet, and completes it.

    Args:
        videos: paths or URLs by name, see `find_videos`.
        say: told in a line what is about to be done.

    Raises:
        LabellingError, BundleError, RuntimeUnavailableError: nothing more can be done; what is
            done stays done.
    """
    bundle = find_bundle(settings)
    rules = Rules(
        model=bundle.name,
        version=bundle.version,
        weights_sha256=bundle.manifest.weights_sha256,
        precision=settings.precision,
        views=parameters.views,
        crops=parameters.crops,
        top_k=parameters.top_k,
    )
    clips = done = failed = 0
    with LabelTable(output.path, rules, output.block, output.again) as table:
        todo = {name: path for name, path in videos.items() if name not in table.done}
        say(_plan(len(videos), len(todo), bundle))
        began = time.monotonic()
        if todo:
            with bar(not quiet) as progress:

                def started(engine: str) -> None:
                    nonlocal began
                    began = time.monotonic()
                    say(engine)

                def add(row: Row) -> None:
                    nonlocal clips, done, failed
                    table.add(row)
                    done += 1
                    if row.get("error_code") is not None:
                        failed += 1
                    else:
                        clips += parameters.views * parameters.crops
                    rate = done / max(time.monotonic() - began, 1e-9)
                    progress.show(_so_far(done, len(todo), failed, rate), done, len(todo))

                label(todo, bundle, parameters, settings, add, started)
        seconds = time.monotonic() - began
        missing = [name for name in todo if name not in table.done]
        if missing:
            raise LabellingError(
                f"{len(missing)} videos came back without an answer, {missing[0]} for one: "
                "the same command goes on with them"
            )
        total, failures = table.finish()
    return Summary(total, failures, len(todo), seconds, clips)


def _so_far(done: int, total: int, failed: int, rate: float) -> str:
    failures = f", {failed:,} failed" if failed else ""
    return f"{done:,} of {total:,} videos, {rate:.1f} videos/s{failures}"


def _plan(videos: int, todo: int, bundle: Bundle) -> str:
    done = f", {videos - todo:,} of them done before" if todo < videos else ""
    return f"{videos:,} videos{done}; {bundle.name} version {bundle.version}"
