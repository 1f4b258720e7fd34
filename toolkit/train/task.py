"""What the training loop needs to know of a task: its data, its loss, its measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Generator, Tensor, nn

from vitkit.runtimes.card import ModelCard


class Batch(NamedTuple):
    """One step's data: how many images, their files, and what the task's `losses` takes."""

    size: int
    files: list[Path]
    data: tuple[Tensor, ...]


class Task(Protocol):
    """A data set ready for training, in memory.

    `card` is that of the run to be; `fingerprint` changes with every change of the data; `metric` names
    the value of `measure` that decides which epoch is best, `unit` is how people call it.
    """

    card: ModelCard
    fingerprint: str
    metric: str
    unit: str

    def __len__(self) -> int:
        """Training images."""
        ...

    def trainable(self, network: nn.Module) -> nn.Module:
        """The network with what only training needs."""
        ...

    def batches(self, generator: Generator) -> Iterator[Batch]:
        """One pass over the training images, in an order and with changes that the generator decides."""
        ...

    def losses(self, module: nn.Module, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """The loss to descend, as `total`, and what else is worth a curve; all scalars."""
        ...

    def measure(self, network: nn.Module) -> dict[str, float]:
        """How good the network is on the validation images."""
        ...
