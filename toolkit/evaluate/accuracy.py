"""Top-1 and top-5 accuracy of a classifier on labelled image folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vitkit.data.folder import labelled_images
from vitkit.evaluate.classes import class_indices
from vitkit.evaluate.network import Network, check_finite
from vitkit.evaluate.results import Table
from vitkit.runtimes.errors import BadArtifact

BATCH = 16
# Options of `evaluate` beside the network and the data: none.
OPTIONS: tuple[str, ...] = ()
# The value of `vitkit evaluate` by which classifiers are compared, and how people call it.
METRIC, UNIT = "top1", "top-1"


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in per cent, and the class given to every image, in the data set's order.

    See `vitkit.evaluate.results.Result`.
    """

    data: str
    images: int
    top1: float
    top5: float
    predictions: tuple[int, ...]

    metric = UNIT
    settings: ClassVar[Mapping[str, Any]] = {}

    @property
    def value(self) -> float:
        """Top-1 in per cent."""
        return self.top1

    def summary(self) -> dict[str, Any]:
        """The measured numbers, for JSON."""
        return {"images": self.images, "top1": self.top1, "top5": self.top5}

    def shown(self, title: str) -> list[str | Table]:
        """One line for the terminal; `title` names the network."""
        return [f"{title}: top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} % of {self.images} images"]


def evaluate(
    network: Network, data: Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> Accuracy:
    """Classify every image of `DIR/CLASS/...`; `progress` gets (images done, images in all).

    Raises BadInput for an unusable folder, an unreadable image, or a class folder that is not exactly one
    class of the network (see `class_indices`); BadArtifact for a network of another task, or with fewer
    scores than classes; RunFailed for outputs that are not finite.
    """
    card = network.card
    if card.task != "classification":
        raise BadArtifact(f"{card.name} does {card.task}; top-1 accuracy is for classification")
    items = labelled_images(data)
    truth = np.array(class_indices(card, [name for _, name in items]))
    output = card.decode.get("probabilities") or card.decode.get("logits", card.outputs[0].name)
    ranks: list[int] = []
    predictions: list[int] = []
    files = [path for path, _ in items]
    for start, outputs in zip(range(0, len(files), BATCH), network.outputs_of(files, BATCH), strict=True):
        paths = files[start : start + BATCH]
        check_finite(card, outputs, paths)
        scores = outputs[output]
        if scores.ndim != 2 or scores.shape[1] <= truth.max():
            raise BadArtifact(
                f"{card.name} gives scores of shape {scores.shape}; there is a class {truth.max()}"
            )
        order = np.argsort(-scores, axis=1, kind="stable")
        expected = truth[start : start + len(paths)]
        ranks += (order == expected[:, None]).argmax(axis=1).tolist()
        predictions += order[:, 0].tolist()
        progress(start + len(paths), len(items))
    rank = np.array(ranks)
    top1, top5 = (100 * float((rank < count).mean()) for count in (1, 5))
    return Accuracy(str(data), len(items), top1, top5, tuple(predictions))
