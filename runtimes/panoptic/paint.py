"""Binary masks and their order -> segments that share no pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.panoptic.masks import BinaryMasks, Candidates, count_bits
from vitkit.runtimes.panoptic.resize import Float64, Size
from vitkit.runtimes.panoptic.results import MergeParameters, Panoptic, Segment


@dataclass
class _Region:
    """A segment in the making: class, thing or stuff, score, and its pixels as packed bits."""

    index: int
    thing: bool
    score: float
    bits: NDArray[np.uint8]


def paint(
    candidates: Candidates,
    masks: BinaryMasks,
    scores: Float64,
    parameters: MergeParameters,
    size: Size,
    labels: Sequence[str],
) -> Panoptic:
    """Accept slots, best first, and write their free pixels; `masks` are overwritten."""
    free = np.full(masks.bits.shape[1:], 255, np.uint8)
    regions: dict[tuple[bool, int], _Region] = {}
    for i in np.argsort(-scores, kind="stable"):
        bits = np.bitwise_and(masks.bits[i], free, out=masks.bits[i])
        if count_bits(bits) <= parameters.overlap * masks.areas[i]:
            continue
        free &= ~bits
        thing, index = bool(candidates.thing[i]), int(candidates.classes[i])
        key = (thing, int(i) if thing else index)
        if key in regions:
            regions[key].bits |= bits
        else:
            regions[key] = _Region(index, thing, float(scores[i]), bits)
    areas = {key: count_bits(region.bits) for key, region in regions.items()}
    ids, segments = np.zeros(size, np.int32), list[Segment]()
    for key in sorted(regions, key=lambda key: (-areas[key], key)):
        region, area = regions[key], areas[key]
        if area < (parameters.thing_area if region.thing else parameters.stuff_area):
            continue
        label = labels[region.index] if labels else str(region.index)
        segments.append(Segment(len(segments) + 1, region.index, label, region.thing, region.score, area))
        used = np.flatnonzero(region.bits.any(axis=1))
        rows = slice(int(used[0]), int(used[-1]) + 1)
        inside = np.unpackbits(region.bits[rows], axis=-1, count=size[1]).view(np.bool_)
        np.copyto(ids[rows], len(segments), where=inside)
    return Panoptic(ids, tuple(segments))
