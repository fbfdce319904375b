"""The processes that train one model together, as `torchrun` starts them; or this one alone.

What they tell each other here is small (losses, a wish to stop, a state to go on from) and goes
over gloo, from CPU to CPU. Gradients and weights go by themselves, see `parallel.py`.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from model.training.errors import LostError, RecipeError, TrainingError

T = TypeVar("T")

LOST_AFTER_S = 600.0
_BEAT_S = 5.0
_POLL_S = 0.05


class World:
    """What one of the processes knows of itself and can say to the others.

    Every method must be called by all of them, in the same order. `local_rank` counts those of
    this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank

    def own(self, device: str) -> str:
        """Which device of its kind belongs to this process."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.size > 1 else device

    def sum(self, *values: float) -> list[float]:
        """Each of the values, added up over the processes."""
        if self.size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        found: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(found, value)
        return found

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives or raises in the first process, alone in doing it, for all of them."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = work()
            except TrainingError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    @contextmanager
    def in_own_time(self) -> Iterator[Callable[[], None]]:
        """For work that takes each process another time, however long; left when all are done.

        Gives a function to call while there is progress. The others wait for a call, not for
        the end, so that they still notice a process that is lost.
        """
        last = time.monotonic()

        def beat() -> None:
            nonlocal last
            if self.size > 1 and time.monotonic() - last > _BEAT_S:
                self._tell(done=False)
                last = time.monotonic()

        try:
            yield beat
        except TrainingError as error:
            if self.size > 1 and not isinstance(error, LostError):
                with suppress(RuntimeError, TrainingError):
                    self._tell(done=True, failed=True)
            raise
        while self.size > 1 and not self._tell(done=True):
            pass

    def _tell(self, done: bool, failed: bool = False) -> bool:
        """Whether all are done.

        Raises:
            LostError: one has failed.
        """
        finished, broken = self.sum(done, failed)
        if broken:
            raise LostError("another process of this run has failed; its own message says why")
        return finished == self.size


ALONE = World()


def started_together() -> int:
    """How many processes were started to train together: 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str, lost_after_s: float = LOST_AFTER_S) -> Iterator[World]:
    """Meets the other processes that `torchrun` has started; without it there are none.

    Args:
        device: `cuda` gives each process of a machine a GPU of its own.
        lost_after_s: how long one is waited for, until it counts as lost.

    Raises:
        LostError: another process ends, or does not answer.
        RecipeError: there are fewer GPUs than processes.
    """
    size = started_together()
    if size == 1:
        yield ALONE
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    if device == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise RecipeError(
                f"this machine has {torch.cuda.device_count()} GPUs, too few for its processes: "
                "give torchrun --nproc-per-node as many"
            )
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    patience = datetime.timedelta(seconds=lost_after_s)
    with _losses_named(lost_after_s):
        store, _, _ = next(rendezvous("env://", timeout=patience))
        store.set_timeout(patience)
        store = PrefixStore(_name_of_this_life(store, world, lost_after_s), store)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=size, timeout=patience
        )
        yield world
        # Not after an error: it might wait for those that are lost.
        dist.destroy_process_group()


def _name_of_this_life(store: Store, world: World, patience_s: float) -> str:
    """A name that these processes agree on, and none that was there before a restart.

    torchrun keeps its store over restarts: without a name of their own, new processes find the
    addresses of the dead there, and wait for them. Its count of restarts would not do as a name,
    since each machine counts its own.
    """
    own = uuid.uuid4().hex
    if world.rank > 0:
        store.set(f"waiting/{world.rank}", own)
        name: str = store.get(f"name for {own}").decode()
        store.set(f"{name}/{world.rank}", "known")
        return name
    unaware = set(range(1, world.size))
    deadline = time.monotonic() + patience_s
    while unaware:
        for rank in unaware:
            # It may be a dead one that has waited here; the living will write over it.
            if store.check([f"waiting/{rank}"]):
                store.set(f"name for {store.get(f'waiting/{rank}').decode()}", own)
        unaware = {rank for rank in unaware if not store.check([f"{own}/{rank}"])}
        if time.monotonic() > deadline:
            raise LostError(f"of the processes of this run, these have not come: {sorted(unaware)}")
        time.sleep(_POLL_S)
    return own


@contextmanager
def _losses_named(lost_after_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _is_a_loss(error):
            raise
        cause = str(error).strip().partition("\n")[0]
        raise LostError(
            f"another process of this run has ended, or has not answered for {lost_after_s:.0f} s; "
            "its own message says why. The same command goes on from the last checkpoint, and "
            f"torchrun --max-restarts gives it by itself ({cause})"
        ) from error


def _is_a_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
