"""Parts of the work for each of several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
# So many chunks are shuffled together.
_WINDOW = 4


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `count`; `add` sums a tensor over all parts, which must all call it."""

    rank: int = 0
    count: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def of(self, items: Sequence[_T]) -> Sequence[_T]:
        """This part's items; over all parts each item comes once."""
        return items[self.rank :: self.count]


def micro_batches(
    chunks: Sequence[int], batch: int, accumulate: int, shard: Shard, seed: int
) -> list[list[int]]:
    """This process' part of an epoch: image numbers for each forward pass, in a random order.

    An optimiser step takes at most `batch` images of all processes together, in `accumulate` passes. All
    passes have the same size, so that gradients average rightly; fewer images than there are passes are
    left out, others in each epoch. `chunks` are numbers of images that are best read together: where there
    are several, each process takes whole ones as far as that divides evenly, in a random order, and
    images are shuffled over a few at a time.
    """
    count = sum(chunks)
    passes = -(-count // batch) * accumulate
    size = max(count // (passes * shard.count), 1)
    total = passes * shard.count * size
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.split(torch.arange(count), list(chunks))
    order = torch.cat([numbers[i] for i in torch.randperm(len(chunks), generator=generator).tolist()])
    if len(chunks) == 1:
        order = order[torch.randperm(count, generator=generator)]
    # Where there are fewer images than passes, some serve twice.
    order = order.repeat(-(-total // count))[:total]
    if len(chunks) == 1:
        return order.reshape(passes, shard.count, size)[:, shard.rank].tolist()  # type: ignore[no-any-return]
    own = order.reshape(shard.count, passes * size)[shard.rank]
    window = -(-_WINDOW * count // len(chunks))
    mixed = torch.cat(
        [part[torch.randperm(len(part), generator=generator)] for part in torch.split(own, window)]
    )
    return mixed.reshape(passes, size).tolist()  # type: ignore[no-any-return]
