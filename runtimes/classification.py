"""Classification: an engine's raw outputs -> the most probable classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import ModelCard, check_decode
from vitkit.runtimes.errors import BadArtifact, BadRequest
from vitkit.runtimes.image import Placement
from vitkit.runtimes.softmax import softmax


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


def decode(
    outputs: Mapping[str, NDArray[Any]], card: ModelCard, place: Placement, top: int = 5
) -> Classification:
    """Outputs of ONE image (no batch dimension) -> its `top` classes.

    A card whose `decode` names `probabilities` in place of `logits` has the softmax in its graph.
    """
    if ready := card.decode.get("probabilities"):
        probabilities = outputs[ready].astype(np.float64)
    else:
        probabilities = softmax(outputs[card.decode.get("logits", card.outputs[0].name)])
    best = np.argsort(-probabilities, kind="stable")[:top]
    labels = tuple(
        Label(int(i), card.labels[i] if card.labels else str(i), float(probabilities[i])) for i in best
    )
    points = outputs.get(card.decode.get("points", ""))
    return Classification(labels, None if points is None else place.to_photo(points))


def check_options(top: int = 5) -> None:
    """Raises BadRequest for options that `decode` cannot use."""
    if type(top) is not int or top < 1:
        raise BadRequest(f"top is {top!r}; it must be an integer of at least 1: decode={{'top': 5}}")


def check_card(card: ModelCard) -> None:
    """Raises BadArtifact for a card whose outputs cannot be decoded."""
    check_decode(card, (), ("logits", "probabilities", "points"))
    role = "probabilities" if "probabilities" in card.decode else "logits"
    scores = card.output(card.decode.get(role, card.outputs[0].name))
    if scores is None or len(scores.shape) != 2:
        raise BadArtifact(
            f"the card's decode names {role} {scores}, which is no output of shape [N, classes]"
        )
    if card.labels and scores.shape[1] not in (None, len(card.labels)):
        raise BadArtifact(f"the card has {len(card.labels)} labels for {scores.shape[1]} logits")
    if "points" in card.decode:
        points = card.output(card.decode["points"])
        if points is None or len(points.shape) != 4 or points.shape[3] != 2:
            raise BadArtifact(
                f"the card's decode names points {points or repr(card.decode['points'])}, which is no output "
                "of shape [N, iterations, points, 2]"
            )
