"""Panoptic segmentation: an engine's raw outputs -> segments at the image's own size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import CARD_FILE, DOCUMENT, ModelCard, check_decode
from vitkit.runtimes.errors import BadArtifact, BadRequest
from vitkit.runtimes.image import Placement
from vitkit.runtimes.panoptic.merge import merge_masks
from vitkit.runtimes.panoptic.results import MergeParameters, Panoptic


def decode(
    outputs: Mapping[str, NDArray[Any]], card: ModelCard, place: Placement, fast: bool = False
) -> Panoptic:
    """Outputs of ONE image (no batch dimension) -> its segments, at the image's own size.

    `fast` changes a few pixels in ten thousand, at the borders of segments, and takes half the time.
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


def check_options(fast: bool = False) -> None:
    """Raises BadRequest for options that `decode` cannot use."""
    if type(fast) is not bool:
        raise BadRequest(f"fast is {fast!r}; it must be True or False: decode={{'fast': True}}")


def merge_parameters(card: ModelCard) -> MergeParameters:
    """The card's own settings of the merge, the published ones if it has none. Raises BadRequest."""
    names = [field.name for field in fields(MergeParameters)]
    return MergeParameters(**{name: card.decode[name] for name in names if name in card.decode})


def check_card(card: ModelCard) -> None:
    """Raises BadArtifact for a card whose outputs cannot be decoded."""
    roles, settings = ("masks", "classes", "things"), [field.name for field in fields(MergeParameters)]
    check_decode(card, roles, (*roles, *settings))
    if not card.labels:
        raise BadArtifact(f"{CARD_FILE} lacks 'labels'; see {DOCUMENT}")
    masks, classes = (card.output(card.decode[role]) for role in ("masks", "classes"))
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
    indices = range(len(card.labels))
    if not isinstance(things, list) or any(
        type(index) is not int or index not in indices for index in things
    ):
        raise BadArtifact(f"the card's decode.things is {things!r}; it must list indices of labels")
    if card.image.fit != "contain":
        raise BadArtifact("the card prepares images by cropping; panoptic results need image.fit 'contain'")
    try:
        merge_parameters(card)
    except BadRequest as error:
        raise BadArtifact(f"the card's decode does not hold: {error}") from None
