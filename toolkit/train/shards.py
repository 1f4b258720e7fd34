"""Parts of the work for each of several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `count`; `add` sums a tensor over all parts, which must all call it."""

    rank: int = 0
    count: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def of(self, items: Sequence[_T]) -> Sequence[_T]:
        """This part's items; over all parts each item comes once."""
        return items[self.rank :: self.count]


def micro_batches(count: int, batch: int, accumulate: int, shard: Shard, seed: int) -> list[list[int]]:
    """This process' part of an epoch: image numbers for each forward pass, in a random order.

    An optimiser step takes at most `batch` images of all processes together, in `accumulate` passes. All
    passes have the same size, so that gradients average rightly; fewer images than there are passes are
    left out, others in each epoch.
    """
    passes = -(-count // batch) * accumulate
    size = max(count // (passes * shard.count), 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    # Where there are fewer images than passes, some serve twice.
    order = order.repeat(-(-passes * shard.count * size // count))[: passes * shard.count * size]
    return order.reshape(passes, shard.count, size)[:, shard.rank].tolist()  # type: ignore[no-any-return]
