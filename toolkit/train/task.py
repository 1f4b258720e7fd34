"""What the training loop needs of a task: data, loss, measure."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Generator, Tensor, nn

from vitkit.runtimes.card import ModelCard
from vitkit.train.config import TrainConfig
from vitkit.train.shards import Shard


class Batch(NamedTuple):
    """One step's data: the files of its images, and what the task's `losses` takes."""

    files: list[Path]
    data: tuple[Tensor, ...]


class TrainingTask(Protocol):
    """A data set ready for training.

    `card` is that of the run to be; `fingerprint` changes with the data; `metric` names the value of
    `measure` that decides which epoch is best, `unit` is how people call it; `files` are the training
    images, of which `chunks` are the numbers that are best read together, in their order. `notes` say what
    of the data is odd but no reason to stop; a measure may add to them.
    """

    card: ModelCard
    fingerprint: str
    metric: str
    unit: str
    files: Sequence[Path]
    chunks: Sequence[int]
    notes: list[str]

    def expect(self, order: Sequence[int]) -> None:
        """These training images are going to be asked for by this process, in this order."""
        ...

    def sample(self, index: int, seed: int) -> Any:
        """One training image, changed as the seed decides; runs in decoding workers. Raises BadInput."""
        ...

    def collate(self, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Samples -> the `data` of a batch."""
        ...

    def trainable(self, network: nn.Module) -> nn.Module:
        """The network with what only training needs."""
        ...

    def losses(self, module: nn.Module, data: tuple[Tensor, ...], generator: Generator) -> dict[str, Tensor]:
        """The loss to descend, as `total`, and what else is worth a curve; `data` is on the device."""
        ...

    def measure(self, network: nn.Module, shard: Shard) -> dict[str, float]:
        """How good the network is on the validation images, of which each process takes its shard."""
        ...


def open_task(training: str, config: TrainConfig, data: str | Path) -> TrainingTask:
    """The data of a training run, ready to train on; `training` is `module:class` of a row in FAMILIES.

    Raises BadRequest for settings that the data or the task cannot take, BadInput for data of another form.
    """
    module, _, name = training.partition(":")
    task: TrainingTask = getattr(import_module(module), name)(config, data)
    return task
