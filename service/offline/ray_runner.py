"""The same on Ray Data: decoders are actors on CPUs, engines an actor pool on GPUs, or on CPUs.

Each decoding actor keeps a decoder process of its own, so that a hostile file costs one video and
not an actor. Rows come back to this process, which alone writes the table; a node that dies has its
videos done again elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import ray

from export.bundle.bundle import Bundle, BundleError
from export.bundle.remote_store import RemoteStore
from service.inference.parameters import ClassifyParameters
from service.offline.errors import LabellingError
from service.offline.local_runner import Decoding, Engine, load
from service.offline.rows import Row
from service.offline.table import SCHEMA
from service.registry.loading import max_batch, store_of
from service.settings import Settings

# Videos of a task, which are done again if its node dies; more where there are very many.
_TASK_VIDEOS = 16
_MOST_TASKS = 10_000


class Cluster(NamedTuple):
    """Which cluster, and how much of it."""

    address: str | None = None
    """As `ray.init` takes it; None starts Ray on this machine."""
    engines: int | None = None
    """By default one a GPU; without GPUs one for every four CPUs."""
    decoders: int | None = None
    """By default all CPUs that the engines leave."""


class _Work(NamedTuple):
    """What an actor needs to know. The bundle is in the store of every node, or fetched into it."""

    name: str
    version: str
    weights_sha256: str
    parameters: ClassifyParameters
    settings: Settings

    def bundle(self) -> Bundle:
        store = store_of(self.settings)
        if self.settings.store_url is not None:
            bundle = RemoteStore(self.settings.store_url).pull(self.name, self.version, store)
        else:
            bundle = store.open(self.name, self.version)
        if bundle.manifest.weights_sha256 != self.weights_sha256:
            raise BundleError(
                f"{bundle.path} on this node is another {self.name} version {self.version}"
            )
        return bundle


def label_on_ray(
    videos: Mapping[str, str],
    bundle: Bundle,
    parameters: ClassifyParameters,
    settings: Settings,
    add: Callable[[Row], None],
    started: Callable[[str], None],
    cluster: Cluster = Cluster(),  # noqa: B008 (immutable)
) -> None:
    """As `label_here`, on a cluster.

    Raises:
        LabellingError: the cluster cannot be reached, or an actor cannot do its work at all.
    """
    work = _Work(bundle.name, bundle.version, bundle.manifest.weights_sha256, parameters, settings)
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address=cluster.address, logging_level=logging.WARNING)
        nodes = ray.cluster_resources()
        engines, gpus, decoders = _shares(nodes, cluster)
        started(
            f"Ray: {int(nodes.get('CPU', 0))} CPUs, {int(nodes.get('GPU', 0))} GPUs; "
            f"{engines} engines, up to {decoders} decoders"
        )
        for row in _rows(videos, work, engines, gpus, decoders):
            add(row)
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise LabellingError(f"Ray could not go on: {_cause(error)}") from error
    finally:
        if ours:
            ray.shutdown()


def _shares(nodes: Mapping[str, float], cluster: Cluster) -> tuple[int, float, int]:
    """(engines, GPUs of each, decoders) for a cluster of these resources."""
    cpus, gpus = int(nodes.get("CPU", 0)), int(nodes.get("GPU", 0))
    engines = cluster.engines or gpus or max(1, cpus // 4)
    # Engines on GPUs ask for no CPU: they wait for the GPU most of the time.
    left = cpus if gpus else cpus - engines
    return engines, 1.0 if gpus else 0.0, cluster.decoders or max(1, left)


def _rows(
    videos: Mapping[str, str], work: _Work, engines: int, gpus: float, decoders: int
) -> Iterator[Row]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rows that are there, not tasks
    size = max(_TASK_VIDEOS, math.ceil(len(videos) / _MOST_TASKS))
    items = [{"name": name, "path": path} for name, path in videos.items()]
    clips = work.parameters.views * work.parameters.crops
    rows = (
        ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / size))
        .map_batches(
            _Decoder,
            fn_constructor_args=(work,),
            batch_size=None,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=decoders),
        )
        .map_batches(
            _Labeller,
            fn_constructor_args=(work,),
            batch_size=max(1, math.ceil(2 * (work.settings.max_batch_clips or 16) / clips)),
            num_cpus=0 if gpus else 1,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(size=engines),
        )
    )
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from table.to_pylist()


class _Decoder:
    """An actor that turns videos into clips, one after the other."""

    def __init__(self, work: _Work) -> None:
        self._runner = asyncio.Runner()
        self._decoding = Decoding(1, work.bundle(), work.parameters, work.settings)
        self._runner.run(self._decoding.__aenter__())

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[Any]]]:
        # Video by video, so that a block of many views is never in memory as a whole.
        for name, path in zip(batch["name"], batch["path"], strict=True):
            clips = self._runner.run(self._decoding.clips(str(path)))
            yield {"name": [str(name)], "clips": [pickle.dumps(clips)]}


class _Labeller:
    """An actor with an engine that turns clips into rows of the table."""

    def __init__(self, work: _Work) -> None:
        self._runner = asyncio.Runner()
        settings = work.settings
        # On CPUs an engine has the one core that Ray gives it.
        model = load(work.bundle(), settings, threads=0 if ray.get_gpu_ids() else 1)
        clips = work.parameters.views * work.parameters.crops
        waiting = clips * max(1, math.ceil(2 * (settings.max_batch_clips or 16) / clips))
        self._engine = Engine(
            model, work.parameters, settings, max(waiting, max_batch(settings, model.runtime))
        )
        self._runner.run(self._engine.__aenter__())

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        async def rows() -> list[Row]:
            names = map(str, batch["name"])
            clips = (pickle.loads(clip) for clip in batch["clips"])  # noqa: S301 - our decoder's
            return await asyncio.gather(*map(self._engine.row, names, clips))

        return pa.Table.from_pylist(self._runner.run(rows()), schema=SCHEMA)


def _cause(error: BaseException) -> str:
    """The innermost reason: Ray wraps a worker's exception several times."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
