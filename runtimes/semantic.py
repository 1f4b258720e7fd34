"""Semantic segmentation: an engine's raw outputs -> the class of every pixel, at the image's own size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import ModelCard, check_decode
from vitkit.runtimes.errors import BadArtifact
from vitkit.runtimes.image import Placement

# The class of pixels that the network did not see.
VOID = -1


@dataclass(frozen=True)
class Semantic:
    """The class of every pixel of one image.

    `classes` (height, width) holds class indices; -1 outside the crop of a card that crops its images.
    `labels` are the names of all classes, by index; the indices as text if the card has no labels.
    """

    classes: NDArray[np.int32]
    labels: tuple[str, ...]

    def shares(self) -> dict[int, float]:
        """Class index -> its share (0..1) of the image's pixels, largest first; only classes that occur."""
        counts = np.bincount(self.classes.ravel() - VOID, minlength=1)[1:] / self.classes.size
        order = np.argsort(-counts, kind="stable")
        return {int(i): float(counts[i]) for i in order if counts[i] > 0}


def decode(outputs: Mapping[str, NDArray[Any]], card: ModelCard, place: Placement) -> Semantic:
    """Outputs of ONE image (no batch dimension) -> the class of every pixel; see `label_map`."""
    logits = outputs[logits_name(card)]
    return Semantic(label_map(logits, place), card.labels or tuple(map(str, range(len(logits)))))


def check_options() -> None:
    """Decoding has no options."""


def logits_name(card: ModelCard) -> str:
    """The output that classes are read from: `decode.logits` of the card, by default the first one."""
    return str(card.decode.get("logits", card.outputs[0].name))


def check_card(card: ModelCard) -> None:
    """Raises BadArtifact for a card whose outputs cannot be decoded."""
    check_decode(card, (), ("logits",))
    logits = card.output(card.decode.get("logits", card.outputs[0].name))
    if logits is None or len(logits.shape) != 4 or logits.shape[1] is None:
        raise BadArtifact(
            f"the card's decode names logits {logits or repr(card.decode.get('logits'))}, which is no output "
            "of shape [N, classes, h, w]"
        )
    if logits.shape[1] < 2:
        raise BadArtifact(
            f"the card's logits {logits} have one class, of which no best one can be taken; "
            'give the card "task": "tensors" to get the map itself'
        )
    if card.labels and logits.shape[1] != len(card.labels):
        raise BadArtifact(
            f"the card has {len(card.labels)} labels for the {logits.shape[1]} maps of {logits}"
        )


def label_map(logits: NDArray[np.floating[Any]], place: Placement) -> NDArray[np.int32]:
    """Logits (K, h, w) of the engine's input -> the best class of every pixel, (height, width) of the image.

    Logits are interpolated at the centre of every pixel, bilinearly with half-pixel centres and edges
    repeated. If the image was stretched to the input, that is `torch.nn.functional.interpolate(logits,
    (height, width), mode="bilinear", align_corners=False).argmax(0)`, and so transformers'
    `post_process_semantic_segmentation`. Padding is left out, as no pixel of the image has its centre there;
    pixels outside a crop are `VOID`. Of classes that are equal the first one wins.
    """
    values = np.ascontiguousarray(logits.transpose(1, 2, 0), np.float32)
    best = values.argmax(axis=2).astype(np.int32)
    rows, columns = (_axis(place, i, values.shape[i]) for i in range(2))
    classes = np.full(place.photo, VOID, np.int32)
    seen = classes[
        rows.start : rows.start + len(rows.first), columns.start : columns.start + len(columns.first)
    ]
    # A class that is the best at all corners of a cell is the best everywhere inside.
    seen[:] = best[rows.first[:, None], columns.first]
    mixed = _mixed_cells(best)
    upper = lower = values[0, :0]
    for y, (first, second, share) in enumerate(zip(rows.first, rows.second, rows.share, strict=True)):
        if y == 0 or first != rows.first[y - 1]:
            x = np.flatnonzero(mixed[first, columns.first])
            upper, lower = (_interpolate(values[row], columns, x) for row in (first, second))
        seen[y, x] = (upper * (1 - share) + lower * share).argmax(axis=1)
    return classes


class _Axis(NamedTuple):
    """Along one axis, the image's pixels that the network saw, from `start` on.

    Each is between the `first` and the `second` of the logits' places; `share` (0..1) is the weight of the
    second.
    """

    start: int
    first: NDArray[np.intp]
    second: NDArray[np.intp]
    share: NDArray[np.float32]


def _axis(place: Placement, axis: int, count: int) -> _Axis:
    size, photo, offset = place.input[axis], place.photo[axis], place.offset[axis]
    resized = round(place.scale[axis] * photo)
    centres = np.arange(photo) + 0.5 - offset
    inside = (centres >= 0) & (centres * place.scale[axis] <= size)
    # In float32, as torch has it: an exact place would give other classes to a few pixels of large images.
    scale = float(np.float32(count * resized / (size * photo)))
    places = np.clip((scale * centres[inside] - 0.5).astype(np.float32), 0, count - 1)
    first = places.astype(np.intp)
    return _Axis(
        int(inside.argmax()), first, np.minimum(first + 1, count - 1), places - first.astype(np.float32)
    )


def _mixed_cells(best: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether the four corners of a cell have several best classes, (h, w) by its upper left corner."""
    edges = np.pad(best, ((0, 1), (0, 1)), mode="edge")
    mixed: NDArray[np.bool_] = (best != edges[1:, :-1]) | (best != edges[:-1, 1:]) | (best != edges[1:, 1:])
    return mixed


def _interpolate(values: NDArray[np.float32], columns: _Axis, x: NDArray[np.intp]) -> NDArray[np.float32]:
    """A row of logits, (w, K) -> those of the pixels `x`, (len(x), K)."""
    share = columns.share[x, None]
    between: NDArray[np.float32] = values[columns.first[x]] * (1 - share) + values[columns.second[x]] * share
    return between
