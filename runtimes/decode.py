"""Decoding: an engine's raw outputs -> what the app asked for. One function per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import ModelCard, TensorSpec
from vitkit.runtimes.errors import BadArtifact, BadRequest
from vitkit.runtimes.image import Placement
from vitkit.runtimes.panoptic import MergeParameters, Panoptic, merge_masks


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


def _output(card: ModelCard, role: str, default: str) -> TensorSpec | None:
    """The output that plays a role in decoding; None where the card names none that exists."""
    name = card.decode.get(role, default)
    return next((spec for spec in card.outputs if spec.name == name), None)


def _check_classification(card: ModelCard) -> None:
    role = "probabilities" if "probabilities" in card.decode else "logits"
    logits = _output(card, role, card.outputs[0].name)
    if logits is None or len(logits.shape) != 2:
        raise BadArtifact(
            f"the card's decode names {role} {logits}, which is no output of shape [N, classes]"
        )
    if card.labels and logits.shape[1] not in (None, len(card.labels)):
        raise BadArtifact(f"the card has {len(card.labels)} labels for {logits.shape[1]} logits")
    if "points" in card.decode and _output(card, "points", "") is None:
        raise BadArtifact(f"the card's decode names points {card.decode['points']!r}, which is no output")


def decode_panoptic(
    outputs: Mapping[str, NDArray[Any]], card: ModelCard, place: Placement, fast: bool = False
) -> Panoptic:
    """Outputs of ONE image -> its segments, at the photograph's own size.

    `fast` changes a few pixels in ten thousand, at the borders of segments, for a fraction of the time.
    """
    things = np.zeros(len(card.labels), np.bool_)
    things[card.decode["things"]] = True
    return merge_masks(
        outputs[card.decode["classes"]],
        outputs[card.decode["masks"]],
        things=things,
        input_size=place.input,
        content=place.content,
        photo_size=place.photo,
        parameters=merge_parameters(card),
        fast=fast,
        labels=card.labels,
    )


def merge_parameters(card: ModelCard) -> MergeParameters:
    """The card's own thresholds, the published ones where it is silent."""
    names = [field.name for field in fields(MergeParameters)]
    return MergeParameters(**{name: card.decode[name] for name in names if name in card.decode})


def _check_panoptic(card: ModelCard) -> None:
    masks, classes = _output(card, "masks", ""), _output(card, "classes", "")
    if masks is None or len(masks.shape) != 4 or classes is None or len(classes.shape) != 3:
        raise BadArtifact(
            f"the card's decode names masks {masks} and classes {classes}; wanted are outputs of shapes "
            "[N, slots, h, w] and [N, slots, classes + 1]"
        )
    if masks.shape[1] != classes.shape[1] or classes.shape[2] != len(card.labels) + 1:
        raise BadArtifact(
            f"the card's masks {masks} and classes {classes} do not fit {len(card.labels)} labels"
        )
    things = card.decode.get("things")
    if not isinstance(things, list) or any(not 0 <= index < len(card.labels) for index in things):
        raise BadArtifact(f"the card's decode.things is {things!r}; it must list indices of labels")
    if card.image.fit != "contain":
        raise BadArtifact("the card prepares images by cropping; panoptic results need image.fit 'contain'")
    try:
        parameters = merge_parameters(card)
        wrong = [f for f in fields(parameters) if isinstance(getattr(parameters, f.name), (str, list))]
    except (TypeError, ValueError) as error:
        raise BadArtifact(f"the card's decode does not hold: {error}") from None
    if wrong:
        raise BadArtifact(f"the card's decode.{wrong[0].name} is no number")


class Task(NamedTuple):
    """How the results of one task come about: the decoding, and what it needs of a card."""

    decode: Callable[..., Any]
    check: Callable[[ModelCard], None]


TASKS = {
    "classification": Task(decode_classification, _check_classification),
    "panoptic": Task(decode_panoptic, _check_panoptic),
}
Decoder = Callable[[Mapping[str, NDArray[Any]], ModelCard, Placement], Any]


def decoder(card: ModelCard, options: Mapping[str, Any] | None = None) -> Decoder:
    """The decoding function of the card's task, the card checked.

    `options` are the function's own (`top` of classification, `fast` of panoptic). Raises BadArtifact for
    a card that cannot be decoded, BadRequest for an option that the task lacks.
    """
    if card.task not in TASKS:
        raise BadArtifact(f"the card's task is {card.task!r}; this vitkit decodes {', '.join(TASKS)}")
    task = TASKS[card.task]
    task.check(card)
    known = list(signature(task.decode).parameters)[3:]
    for name in options or {}:
        if name not in known:
            raise BadRequest(f"decoding of {card.task} has no option {name!r}; it has {', '.join(known)}")
    return partial(task.decode, **(options or {}))
