"""What a merge is asked for and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.errors import BadRequest


@dataclass(frozen=True)
class MergeParameters:
    """Settings of the merge; the defaults are those published for COCO.

    A pixel is in a slot's binary mask above `mask_threshold` (probability). A slot's score is class
    probability ** `class_power` * mean mask probability ** `mask_power`; it is accepted above
    `thing_threshold` or `stuff_threshold`, if more than `overlap` (share) of its binary mask is still
    free. Segments of fewer than `thing_area` or `stuff_area` pixels are then dropped, as deeplab2 does.
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
        if not 0 <= self.mask_threshold <= 1:
            raise BadRequest(f"mask_threshold is {self.mask_threshold}; it must be in 0..1")


@dataclass(frozen=True)
class Segment:
    """One thing, or all stuff of one class.

    `id` (>= 1) marks its pixels, `area` counts them, `index` is the class. `score` (0..1) is that of its
    slot, of the best one where stuff of one class was merged; rounding moves it by less than 1e-3.
    """

    id: int
    index: int
    label: str
    thing: bool
    score: float
    area: int


@dataclass(frozen=True)
class Panoptic:
    """Segments of one photograph, largest first with ids 1..n.

    `ids` (height, width) holds every pixel's segment id, 0 where there is none.
    """

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]
