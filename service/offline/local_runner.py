"""Decoders and engine of this machine: videos are decoded in isolated processes, several at once,
and the clips of all that are ready go through the network together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from export.bundle.bundle import Bundle
from model.data.remote import is_url, local_video
from model.video import Clips, VideoError
from service.decoding.messages import DecodeRequest, DecoderLimits
from service.decoding.pool import DecoderPool
from service.errors import InternalError, VideoRejectedError
from service.inference.batcher import Batcher
from service.inference.parameters import ClassifyParameters
from service.offline.errors import LabellingError
from service.offline.local import check_readable
from service.offline.rows import Row, failed, labelled
from service.registry.loading import LoadedModel, largest_batch, load_model, max_batch
from service.registry.tensorrt_plans import Engines, find_tensorrt
from service.settings import Settings

logger = logging.getLogger(__name__)

# Videos that are fetched ahead: object stores answer late and to many at once.
_FETCHES = 16
# An engine that fails this often without a success between is broken, not the videos.
_ENGINE_FAILURES = 20


def label_here(
    videos: Mapping[str, str],
    bundle: Bundle,
    parameters: ClassifyParameters,
    settings: Settings,
    add: Callable[[Row], None],
    started: Callable[[str], None],
) -> None:
    """Labels videos, by name and path; `add` is given each row as it is done.

    Args:
        started: told once what runs the network, before the first row.

    Raises:
        BundleError, RuntimeUnavailableError: the model cannot be run here.
        LabellingError: the engine failed on one video after the other.
    """
    model = load(bundle, settings)
    started(f"{model.runtime.engine} {model.runtime.provider}, {model.runtime.precision}")
    try:
        asyncio.run(_label_all(videos, model, parameters, settings, add))
    finally:
        model.close()


def load(bundle: Bundle, settings: Settings, threads: int = 0) -> LoadedModel:
    """The bundle on the best engine here; a TensorRT plan only if it is there already.

    Args:
        threads: as in `load_model`.
    """
    tensorrt, _ = find_tensorrt(settings)
    largest = largest_batch(settings, "cuda")
    engines = Engines(tensorrt, largest, settings.precision, builds=False) if tensorrt else None
    model = load_model(bundle, settings, engines, threads)
    if model.tensorrt.reason and engines is not None:
        logger.warning("TensorRT is %s", model.tensorrt)
    return model


async def _label_all(
    videos: Mapping[str, str],
    model: LoadedModel,
    parameters: ClassifyParameters,
    settings: Settings,
    add: Callable[[Row], None],
) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_FETCHES))
    clips = parameters.views * parameters.crops
    # Decoders never wait for work, and two batches of clips are ready or in each engine.
    running = 2 * max_batch(settings, model.runtime) * len(model.runtimes)
    ahead = settings.decode_workers + math.ceil(running / clips)
    if any(map(is_url, videos.values())):
        ahead += _FETCHES
    todo = iter(videos.items())
    async with (
        Decoding(settings.decode_workers, model.bundle, parameters, settings) as decoding,
        Engine(model, parameters, settings, most_waiting=ahead * clips) as engine,
    ):

        async def work() -> None:
            for name, path in todo:
                clips = await decoding.clips(path)
                add(await engine.row(name, clips))

        tasks = [asyncio.create_task(work()) for _ in range(ahead)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Refused(Exception):  # noqa: N818 - not raised: what a video gets instead of clips
    """Why a video has no clips."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail


class Decoding:
    """Decoder processes, for as long as the context runs."""

    def __init__(
        self, workers: int, bundle: Bundle, parameters: ClassifyParameters, settings: Settings
    ) -> None:
        self._sees = bundle.config.preprocessing
        self._parameters = parameters
        self._settings = settings
        self._pool = DecoderPool(workers, DecoderLimits.of(settings), lambda reason: None)

    async def __aenter__(self) -> Decoding:
        await self._pool.start()
        try:
            missing = self._pool.missing_layers(self._settings)
        except BaseException:
            self._pool.close()
            raise
        if missing and self._settings.decode_sandbox != "off":
            logger.warning("decoders run without a part of their sandbox: %s", missing)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pool.close()

    async def clips(self, path: str) -> Clips | Refused:
        """The clips of a local or remote video, or why there are none."""
        views, crops = self._parameters.views, self._parameters.crops
        try:
            async with _fetched(path) as file:
                return await self._pool.decode(DecodeRequest(file, self._sees, views, crops))
        except VideoRejectedError as error:
            return Refused(error.code, error.detail)
        except VideoError as error:
            return Refused(error.code, str(error))


@contextlib.asynccontextmanager
async def _fetched(path: str) -> AsyncIterator[Path]:
    if not is_url(path):
        yield _readable(path)
        return
    video = local_video(path)
    file = await asyncio.to_thread(video.__enter__)
    try:
        yield Path(file)
    finally:
        await asyncio.to_thread(video.__exit__, None, None, None)


def _readable(path: str) -> Path:
    check_readable(Path(path))
    return Path(path).absolute()


class Engine:
    """A loaded model with a queue that fills batches across videos, while the context runs."""

    def __init__(
        self,
        model: LoadedModel,
        parameters: ClassifyParameters,
        settings: Settings,
        most_waiting: int,
    ) -> None:
        self._bundle = model.bundle
        self._parameters = parameters
        self._failures = 0
        self._batcher = Batcher(
            model.runtimes,
            max_batch=max_batch(settings, model.runtime),
            max_queue=most_waiting,
        )

    async def __aenter__(self) -> Engine:
        self._batcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._batcher.close()

    async def row(self, name: str, clips: Clips | Refused) -> Row:
        """The row of a video.

        Raises:
            LabellingError: the engine fails on everything.
        """
        if isinstance(clips, Refused):
            return failed(name, clips.code, clips.detail, self._bundle)
        try:
            answer = await self._batcher.submit(clips.frames)
        except InternalError as error:
            self._failures += 1
            if self._failures >= _ENGINE_FAILURES:
                raise LabellingError(
                    f"the engine failed on {self._failures} videos, one after the other; "
                    "the log says how"
                ) from error
            return failed(name, error.code, error.detail, self._bundle)
        self._failures = 0
        return labelled(name, clips, answer.logits, self._bundle, self._parameters)
