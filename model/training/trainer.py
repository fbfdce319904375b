"""The state of a training run: its steps, its saved states, and the result that it writes. Who
calls them when is in `loop.py`. Every process of a run has one, and calls the same of it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from model.checkpoints import save_safetensors
from model.data.lists import VideoList
from model.evaluation.calibration import calibrate
from model.evaluation.metrics import (
    Metrics,
    Predictions,
    Protocol,
    joined_predictions,
    measure,
    predict_part,
)
from model.files import write_atomic
from model.network.timesformer import DropPath, TimeSformer
from model.reports.training_report import PAGE, Evaluated, write_report
from model.training import checkpoint
from model.training.config import Job, Machine, Step
from model.training.data.augmentation import augment
from model.training.data.clip_cache import ClipCache, Draws, open_cache
from model.training.data.loader import Batch, BatchOrder, Replaced, TrainingClips, load_batches
from model.training.distributed.batch_shards import share
from model.training.distributed.parallel import (
    last_of_step,
    load_optimizer,
    load_weights,
    spread,
    whole,
)
from model.training.distributed.process_group import ALONE, World
from model.training.early_stopping import Best
from model.training.errors import (
    CheckpointError,
    DivergedError,
    RecipeError,
    TrainingError,
)
from model.training.event_log import LOG, read_log
from model.training.fingerprint import check_alike, check_identity, identity_of, software
from model.training.initialisation import fresh_model
from model.training.lora import adapt, merged
from model.training.optimisation import Average, build_optimizer, freeze, rate, set_rate

WEIGHTS, REPORT, CHECKPOINTS = "weights.safetensors", "training.json", "checkpoints"
_AUGMENTATION = 2  # what a draw is for, as `_ORDER` and `_CLIP` in data.py
_RECOMPUTED_PATCHES = 10_000  # of a clip: `hr`, `large`, `long-64` and `long-96` have more
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Run:
    """The state of a run: weights, average, optimiser, scaler, step, and what has been counted."""

    def __init__(
        self, model: TimeSformer, job: Job, machine: Machine, world: World = ALONE
    ) -> None:
        recipe, settings = job.recipe, job.recipe.optimisation
        self.job, self.machine, self.world = job, machine, world
        self.identity = identity_of(model, recipe, job.videos, job.validation)
        _check_machine(machine, world)
        check_alike(world.gather(self.identity))
        self.augmentation = recipe.augmentation.for_labels(job.videos.labels)
        self.device = torch.device(machine.device)
        self.on_gpu = self.device.type == "cuda"
        if settings.train == "lora":
            adapt(model, settings.lora_rank, settings.lora_alpha, recipe.seed)
        freeze(model, settings.train)
        self.model = model.to(self.device)
        patches = model.config.num_frames * model.config.grid**2
        self.model.recompute = machine.recompute or (
            machine.recompute is None and patches > _RECOMPUTED_PATCHES
        )
        if machine.compile is not None:
            # In place: a wrapper would change the names of the weights.
            self.model.compile(backend=machine.compile)
        self.share = share(recipe.batch_size, world.rank, world.size, recipe.augmentation.mixes)
        if world.size > 1:
            rows = torch.tensor(self.share.rows, device=self.device)
            for each in model.modules():
                if isinstance(each, DropPath):
                    each.clips, each.rows = recipe.batch_size, rows
        self.network = spread(self.model, world, machine.shard)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.average = Average(self.model, settings.ema) if settings.ema else None
        self.optimizer = build_optimizer(self.model, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        self.clips_per_step = recipe.batch_size * settings.accumulate
        self.last = max(
            math.floor(settings.epochs * len(job.videos.samples) / self.clips_per_step), 1
        )
        self.step = 0
        self.seconds = 0.0
        self.best = Best(settings)
        if settings.patience and job.validation is None:
            raise RecipeError(
                "patience needs videos to evaluate on: give --validation or --hold-out, "
                "or set patience to 0"
            )
        self.replaced: collections.Counter[str] = collections.Counter()
        self.replaced_now: list[Replaced] = []
        self.cache: ClipCache | None = None
        torch.manual_seed(recipe.seed)

    def open_cache(self, done: Callable[[int, int], object]) -> None:
        """Fills the machine's cache of clips, or finds it full; nothing where there is none.

        Raises:
            DataError: it cannot be written.
            RecipeError: there is a cache, and a recipe that has new views in every epoch.
        """
        recipe, machine = self.job.recipe, self.machine
        if machine.cache is None:
            return
        if not recipe.view.cached:
            raise RecipeError(
                "a cache of clips needs the number of views of each video that are kept in it: "
                "--cached-views, or `cached` in the recipe"
            )
        sees = self.model.config.preprocessing
        draws = Draws(self.job.videos, sees, recipe.view, recipe.seed)
        told = done if self.world.rank == 0 else lambda count, videos: None
        # The first process of each machine fills it, the others find it full.
        for filling in (True, False):
            with self.world.in_own_time() as beat:
                if filling is (self.world.local_rank == 0):
                    self.cache = open_cache(
                        machine.cache,
                        draws,
                        processes=machine.workers,
                        done=lambda count, videos: (beat(), told(count, videos)),
                    )

    def about(self) -> dict[str, Any]:
        """What is trained on what, and where."""
        return {
            "videos": len(self.job.videos.samples),
            "validation_videos": len(self.job.validation.samples) if self.job.validation else 0,
            "device": self.device.type,
            "processes": self.world.size,
            "identity": self.identity,
            "software": software(),
        }

    # ---- steps --------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Every step that is left, done when it is yielded."""
        accumulate = self.job.recipe.optimisation.accumulate
        batches = self._batches(range(self.step * accumulate, self.last * accumulate))
        while not self.complete:
            began = time.perf_counter()
            yield self._do_step([next(batches) for _ in range(accumulate)], began)

    @property
    def complete(self) -> bool:
        """Whether there are no steps left."""
        return self.step == self.last or self.best.over

    def is_evaluated(self) -> bool:
        """Whether the last step has completed an epoch.

        The last epoch's result is evaluated by `finish`, but among others it must compete first.
        """
        if self.step == self.last:
            return self.best.patience > 0
        return self._epoch(self.step) // 1 > self._epoch(self.step - 1) // 1

    def _epoch(self, step: float) -> float:
        return step * self.clips_per_step / len(self.job.videos.samples)

    def _batches(self, which: range) -> Iterator[tuple[int, Batch]]:
        """Batches with their numbers."""
        recipe, videos = self.job.recipe, self.job.videos
        labels = np.array([sample.label for sample in videos.samples])
        order = BatchOrder(
            labels, recipe.batch_size, recipe.seed, which, recipe.balanced, self.share.rows
        )
        cached = self.cache.clip if self.cache else None
        sees = self.model.config.preprocessing
        clips = TrainingClips(videos, sees, recipe.view, recipe.seed, cached)
        # Reading from memory is not worth the way through another process.
        workers = 0 if cached else self.machine.workers
        try:
            yield from zip(which, load_batches(clips, order, workers), strict=True)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a process that decodes videos has died: {error}. `timesformer data check` finds "
                "files that crash the decoder; the same command goes on from the last checkpoint"
            ) from error

    def _do_step(self, batches: list[tuple[int, Batch]], began: float) -> Step:
        settings = self.job.recipe.optimisation
        learning_rate = rate(self._epoch(self.step + 0.5), settings)
        set_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        ours = 0.0
        for count, (number, batch) in enumerate(batches, start=1):
            with last_of_step(self.network, last=count == len(batches)):
                ours += self._backward(number, batch)
        self.replaced_now = [each for _, batch in batches for each in batch.replaced]
        loss, replaced = self.world.sum(ours, len(self.replaced_now))
        if replaced:
            everywhere = self.world.gather(self.replaced_now)
            self.replaced_now = [each for theirs in everywhere for each in theirs]
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of step {self.step + 1} is {loss}: the last checkpoint is from before; "
                "train again with a lower learning rate, a longer warm-up or clipped gradients"
            )
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.weights, settings.clip_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        self.replaced.update(each.path for each in self.replaced_now)
        took = time.perf_counter() - began
        self.seconds += took
        return Step(
            self.step,
            self.last,
            self._epoch(self.step),
            loss,
            learning_rate,
            whole(norm).item(),
            self.clips_per_step / took,
        )

    def _backward(self, number: int, batch: Batch) -> float:
        """Adds the gradients of what is here of one batch; returns its share of the step's loss."""
        recipe = self.job.recipe
        draws = torch.Generator().manual_seed(_seed(recipe.seed, number))
        frames, targets = augment(
            batch.frames.to(self.device, non_blocking=True),
            batch.labels.to(self.device),
            self.model.config.num_classes,
            self.augmentation,
            draws,
            self.share,
        )
        dtype = _DTYPES.get(recipe.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            logits, _ = self.network(frames)
        loss = F.cross_entropy(logits.float(), targets) / recipe.optimisation.accumulate
        # Of the processes the mean is taken; those with more clips of the batch count for more.
        loss = loss * (len(frames) * self.world.size / recipe.batch_size)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call] # of torch
        return loss.item() / self.world.size

    # ---- states -------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state, whole and from the first process; see `checkpoint.save`."""
        state = {
            "identity": json.dumps(self.identity),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best.state_dict(),
            # Order, views and augmentation are drawn from the seed and the step, and need no state.
            # What the network draws is the same in every process.
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.on_gpu else None,
            "seconds": self.seconds,
            "replaced": dict(self.replaced),
        }
        state = whole(state, keep=self.world.rank == 0)
        self.world.first(lambda: checkpoint.save(self.job.out / CHECKPOINTS, self.step, state))

    def resume(self) -> None:
        """Goes to the newest intact state, if there is any; all processes to the same.

        Raises:
            CheckpointError: there are states, but none that can be used.
        """
        found = self.world.first(lambda: checkpoint.load_newest(self.job.out / CHECKPOINTS))
        if found is None:
            return
        step, state = found
        check_identity(json.loads(state["identity"]), self.identity, self.job.out)
        load_weights(self.model, state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best.load_state_dict(state["best"])
        torch.set_rng_state(state["random"])
        if self.on_gpu and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.seconds = state["seconds"]
        self.replaced.update(state["replaced"])
        self.step = step

    # ---- the result ---------------------------------------------------------------------------

    def current(self) -> TimeSformer:
        """A copy of the network in eval mode, with the average of its weights if there is one."""
        state = self.model.state_dict()
        if self.average is not None:
            state |= self.average.weights
        return self._network(whole(state))

    def result(self) -> TimeSformer:
        """The network in eval mode that the run is for: the best evaluated, or the last."""
        return self.current() if self.best.weights is None else self._network(self.best.weights)

    def _network(self, state: dict[str, Tensor]) -> TimeSformer:
        # A seed of its own: random numbers drawn here would change what a resumed run draws.
        model = fresh_model(self.model.config, seed=0)
        settings = self.job.recipe.optimisation
        model.load_state_dict(merged(state, settings.lora_rank, settings.lora_alpha))
        return model.to(self.device).eval()

    def evaluate_epoch(self) -> Metrics | None:
        """Metrics of the current weights, one clip a video; the best ones are kept."""
        if self.job.validation is None:
            return None
        model = self.current()
        parts = self._predict(self.job.validation, model, Protocol(views=1, crops=1))
        metrics = self.world.first(lambda: measure(joined_predictions(parts)))
        self.best.take(self.step, metrics, model.state_dict())
        return metrics

    def _predict(
        self, videos: VideoList, model: TimeSformer, protocol: Protocol
    ) -> list[Predictions]:
        """What a network says of some videos, a share of which each process evaluates."""
        count, rank, size = len(videos.samples), self.world.rank, self.world.size
        ours = videos.samples[count * rank // size : count * (rank + 1) // size]
        with self.world.in_own_time() as beat:
            found = predict_part(
                dataclasses.replace(videos, samples=ours),
                model.config.preprocessing,
                classifier(model),
                protocol,
                processes=self.machine.workers,
                done=lambda count: beat(),
            )
        return self.world.gather(found)

    def finished(self) -> dict[str, Any] | None:
        """The report of a run of this identity that is complete."""
        report, weights = self.job.out / REPORT, self.job.out / WEIGHTS
        if not (report.exists() and weights.exists()):
            return None
        contents: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        check_identity(contents.get("identity", {}), self.identity, self.job.out)
        return contents

    def finish(self) -> dict[str, Any]:
        """Evaluates by the paper's protocol, calibrates, and writes weights and report."""
        model, validation = self.result(), self.job.validation
        parts = self._predict(validation, model, Protocol()) if validation else []
        return self.world.first(lambda: self._write(model, parts))

    def _write(self, model: TimeSformer, parts: list[Predictions]) -> dict[str, Any]:
        out = self.job.out
        predictions = joined_predictions(parts) if parts else None
        calibration = calibrate(predictions) if predictions else None
        evaluated = None
        if predictions is not None:
            evaluated = Evaluated(predictions, model.config.preprocessing, calibration=calibration)
        report = {
            "metrics": measure(predictions).to_dict() if predictions else None,
            "temperature": calibration.temperature if calibration else 1.0,
            "calibration": calibration.to_dict() if calibration else None,
            "protocol": Protocol()._asdict(),
            # How many, not which: this is published with the model. Which, says the log.
            "replaced_clips": self.replaced.total(),
            "replaced_videos": len(self.replaced),
            "steps": self.step,
            "weights_of_step": self.best.step or self.step,
            "seconds": round(self.seconds, 1),
            **self.about(),
        }
        try:
            save_safetensors(model, out / WEIGHTS, model.config, labels=self.job.videos.labels)
            write_report(
                out / PAGE,
                f"Training of {out.absolute().name}",
                report,
                read_log(out / LOG),
                evaluated,
                processes=self.machine.workers,
            )
            write_atomic(out / REPORT, json.dumps(report, indent=2) + "\n")
        except (
            OSError,
            SafetensorError,
        ) as error:  # safetensors has words of its own for a full disk
            raise CheckpointError(
                f"cannot write the result into {out}: {error}; "
                "make room, and the same command writes it from the last checkpoint"
            ) from error
        return report


def classifier(model: TimeSformer) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """The network as the function that `evaluation.predict` takes; one clip at a time on a CPU."""
    device = model.head.weight.device

    def classify(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        at_once = len(frames) if device.type == "cuda" else 1
        parts = torch.split(torch.from_numpy(frames).to(device), at_once)
        with torch.inference_mode():
            logits: NDArray[np.float32] = (
                torch.cat([model(part)[0] for part in parts]).cpu().numpy()
            )
        return logits

    return classify


def _check_machine(machine: Machine, world: World) -> None:
    if machine.shard and world.size == 1:
        raise RecipeError(
            "one process has nobody to share the weights with: start several with torchrun, or "
            "train without --shard"
        )


def _seed(seed: int, batch: int) -> int:
    return int(np.random.SeedSequence([seed, _AUGMENTATION, batch]).generate_state(1, np.uint64)[0])
