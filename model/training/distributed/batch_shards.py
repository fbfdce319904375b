"""Which clips of a batch belong to which process, and random numbers that do not depend on it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from model.training.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Share:
    """The clips of a batch that this process has: those numbered `rows`, rising, of `count`."""

    count: int
    rows: tuple[int, ...]

    @classmethod
    def whole(cls, count: int) -> Share:
        return cls(count, tuple(range(count)))

    def of(self, values: Tensor) -> Tensor:
        """The part of (count, ...) that belongs to the clips here."""
        return values if len(self.rows) == self.count else values[list(self.rows)]


def share(count: int, rank: int, size: int, pairs: bool) -> Share:
    """What process `rank` of `size` has of every batch of `count` clips; as even as can be.

    Args:
        pairs: clips are mixed with those opposite in the batch, and stay with them.

    Raises:
        RecipeError: there is nothing for some of the processes.
    """
    units = (count + 1) // 2 if pairs else count
    if units < size:
        what = "pairs of clips, as mixup and cutmix need them" if pairs else "clips"
        raise RecipeError(
            f"a batch of {count} has {units} {what}, too few for {size} processes: batch_size is "
            "that of all of them together; give a larger one, or use fewer processes"
        )
    mine = range(rank * units // size, (rank + 1) * units // size)
    if not pairs:
        return Share(count, tuple(mine))
    return Share(count, tuple(sorted({*mine, *(count - 1 - first for first in mine)})))


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random numbers for a batch. Those of all its clips are drawn, wherever they are: the same
    generator gives a clip the same numbers whoever has it.

    `generator` is on the CPU, so that draws are the same on every device.
    """

    generator: torch.Generator
    share: Share

    def uniform(self, *shape: int) -> Tensor:
        """From 0 to 1, (clips here, *shape)."""
        drawn = torch.rand(self.share.count, *shape, generator=self.generator)
        return self.share.of(drawn)

    def integers(self, below: int, *shape: int) -> Tensor:
        """int64 from 0, (clips here, *shape)."""
        drawn = torch.randint(below, (self.share.count, *shape), generator=self.generator)
        return self.share.of(drawn)
