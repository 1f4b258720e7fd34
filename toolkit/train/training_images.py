"""A task's training images as decoding workers make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from vitkit.runtimes.errors import BadInput, VitkitError
from vitkit.train.task import TrainingTask

_TRIES = 10


class TrainingImages(Dataset[Any]):
    """A task's training images under (number, seed); for one that cannot be read, the next one that can."""

    def __init__(self, task: TrainingTask) -> None:
        self.task = task

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, set[str], Any]:
        first, seed = place
        # By the reason, which names the file: one that is pasted into others is not the one asked for.
        unreadable: set[str] = set()
        for step in range(_TRIES):
            index = (first + step) % len(self.task.files)
            try:
                return index, unreadable, self.task.sample(index, seed)
            except BadInput as error:
                unreadable.add(str(error))
            # Raised in a decoding worker, it would come with the worker's own traceback.
            except VitkitError as error:
                return index, unreadable, error
        reason = min(unreadable)
        return index, unreadable, BadInput(f"{_TRIES} training images in a row cannot be read: {reason}")

    def collate(self, samples: Sequence[tuple[int, set[str], Any]]) -> tuple[Any, ...]:
        """(numbers, why files cannot be read, the task's batch or the error that ends it)."""
        numbers, unreadable, found = zip(*samples, strict=True)
        error = next((sample for sample in found if isinstance(sample, VitkitError)), None)
        data = self.task.collate(found) if error is None else error
        return numbers, set().union(*unreadable), data
