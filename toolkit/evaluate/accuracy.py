"""Top-1 and top-5 accuracy of a classifier on labelled image folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.data.folder import labelled_images
from vitkit.evaluate.network import Network
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.errors import BadArtifact, BadInput
from vitkit.runtimes.image import prepare_batch, read_image

BATCH = 16


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in per cent, and the class given to every image, in the data set's order."""

    images: int
    top1: float
    top5: float
    predictions: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """The measured numbers, for JSON."""
        return {"images": self.images, "top1": self.top1, "top5": self.top5}


def evaluate(
    network: Network, data: Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> Accuracy:
    """Classify every image of `DIR/CLASS/...`; `progress` hears (images done, images in all).

    Raises BadInput for an unusable folder, an unknown class or an unreadable image, naming it.
    """
    if network.card.task != "classification":
        raise BadArtifact(f"{network.card.name} does {network.card.task}, which cannot be evaluated here")
    items = labelled_images(data)
    truth = np.array(class_indices(network.card, [name for _, name in items]))
    logits = network.card.decode.get("logits", network.card.outputs[0].name)
    ranks, predictions = [], []
    for start in range(0, len(items), BATCH):
        photos = [read_image(path) for path, _ in items[start : start + BATCH]]
        inputs = prepare_batch(photos, network.card.image)
        scores = network.predict(inputs)[logits]
        wanted = truth[start : start + len(photos)]
        order = np.argsort(-scores, axis=1, kind="stable")
        ranks.append((order == wanted[:, None]).argmax(axis=1))
        predictions += order[:, 0].tolist()
        progress(start + len(photos), len(items))
    rank = np.concatenate(ranks)
    return Accuracy(
        len(items), 100 * float((rank < 1).mean()), 100 * float((rank < 5).mean()), tuple(predictions)
    )


def class_indices(card: ModelCard, names: list[str]) -> list[int]:
    """Folder names -> class indices, by the card's label ids, its labels, or as plain numbers.

    Raises BadInput naming the folders that are none of these.
    """
    known = {str(i): i for i in range(len(card.labels))}
    known |= {name: i for i, name in enumerate(card.labels)}
    known |= {name: i for i, name in enumerate(card.label_ids or ())}
    if unknown := sorted(set(names) - set(known)):
        some = ", ".join((card.label_ids or card.labels)[:3])
        raise BadInput(
            f"{len(unknown)} folders are no class of {card.name}: {', '.join(unknown[:5])}; "
            f"its {len(card.labels)} classes are {some}, ..."
        )
    return [known[name] for name in names]
