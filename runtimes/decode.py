"""Decoding: an engine's raw outputs -> what the app asked for. One function per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.errors import BadArtifact
from vitkit.runtimes.image import Placement


@dataclass(frozen=True)
class Label:
    """One class with the probability that the model gives it (0..1)."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Classification:
    """Classes of one image, most probable first.

    `points` are PS-ViT's sampling points of every iteration, (T, n*n, 2) as (y, x) in pixels of the
    image that was handed in; None for models without them.
    """

    top: tuple[Label, ...]
    points: NDArray[np.floating] | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return self.top[0].name

    @property
    def probability(self) -> float:
        """Probability of the most probable class."""
        return self.top[0].probability


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Softmax over the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def decode_classification(
    outputs: Mapping[str, NDArray[Any]], card: ModelCard, place: Placement, top: int = 5
) -> Classification:
    """Outputs of ONE image (no batch dimension) -> its `top` classes."""
    probabilities = softmax(outputs[card.decode.get("logits", card.outputs[0].name)])
    best = np.argsort(-probabilities, kind="stable")[:top]
    labels = tuple(
        Label(int(i), card.labels[i] if card.labels else str(i), float(probabilities[i])) for i in best
    )
    points = outputs.get(card.decode.get("points", ""))
    return Classification(labels, None if points is None else place.to_photo(points))


TASKS: dict[str, Callable[[Mapping[str, NDArray[Any]], ModelCard, Placement], Any]] = {
    "classification": decode_classification
}


def decoder(card: ModelCard) -> Callable[[Mapping[str, NDArray[Any]], ModelCard, Placement], Any]:
    """The decoding function of the card's task, the card checked; raises BadArtifact where it cannot."""
    if card.task not in TASKS:
        raise BadArtifact(f"the card's task is {card.task!r}; this vitkit decodes {', '.join(TASKS)}")
    names = {spec.name: spec for spec in card.outputs}
    logits = names.get(card.decode.get("logits", card.outputs[0].name))
    if logits is None or len(logits.shape) != 2:
        raise BadArtifact(
            f"the card's decode names logits {logits}, which is no output of shape [N, classes]"
        )
    if card.labels and logits.shape[1] not in (None, len(card.labels)):
        raise BadArtifact(f"the card has {len(card.labels)} labels for {logits.shape[1]} logits")
    if "points" in card.decode and card.decode["points"] not in names:
        raise BadArtifact(f"the card's decode names points {card.decode['points']!r}, which is no output")
    return TASKS[card.task]
