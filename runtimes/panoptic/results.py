"""What a merge is asked for and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.errors import BadRequest

_RANGES = {
    **dict.fromkeys(("mask_threshold", "thing_threshold", "stuff_threshold", "overlap"), (0, 1)),
    **dict.fromkeys(("class_power", "mask_power"), (0, 100)),
    **dict.fromkeys(("thing_area", "stuff_area"), (0, 2**31)),
}


@dataclass(frozen=True)
class MergeParameters:
    """Settings of the merge; the defaults are those published for COCO.

    A pixel is in a slot's binary mask if its probability exceeds `mask_threshold`. Slots take their turns in
    descending order of class probability ** `class_power` * mean mask probability ** `mask_power`. That score
    only orders them: a slot is accepted if its class probability alone exceeds `thing_threshold` or
    `stuff_threshold`, and if more than the share `overlap` of its binary mask is still free. All shares and
    probabilities are in 0..1. Segments of fewer than `thing_area` or `stuff_area` pixels are then dropped, as
    deeplab2 does and kmax-deeplab does not.

    Published: thresholds of 0.7 and 0.5, overlap 0.8, powers (1, 1) for COCO; 0.5, 0.3, 0.9, (1, 0) for
    Cityscapes; 0.4, 0.4, 0.8, (1, 1) for ADE20K. Raises BadRequest.
    """

    mask_threshold: float = 0.4
    thing_threshold: float = 0.7
    stuff_threshold: float = 0.5
    overlap: float = 0.8
    class_power: float = 1.0
    mask_power: float = 1.0
    thing_area: int = 0
    stuff_area: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise BadRequest(f"{name} is {value!r:.40}; it must be a number from {least} to {most}")


@dataclass(frozen=True)
class Segment:
    """One thing, or all stuff of one class.

    `id` (>= 1) marks its pixels, `area` counts them, `index` is the class. `score` (0..1) is the one that
    orders the slots (see `MergeParameters`), the best slot's if stuff of one class was merged; it may be
    below the thresholds. Rounding moves it by less than 1e-5, the fast mode by some thousandths.
    """

    id: int
    index: int
    label: str
    thing: bool
    score: float
    area: int


@dataclass(frozen=True)
class Panoptic:
    """Segments of one image, largest first with ids 1..n.

    `ids` (height, width) holds every pixel's segment id, 0 where there is none.
    """

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]
