"""Candidates for segments, and their binary masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.panoptic.resize import Float64, Floats, Size


@dataclass
class Candidates:
    """Slots whose class is confident enough to be accepted.

    For each: its number, its class, whether that is a thing, and class probability ** class power.
    """

    slots: NDArray[np.intp]
    classes: NDArray[np.intp]
    thing: NDArray[np.bool_]
    class_scores: Float64


class BinaryMasks:
    """Binary masks of C candidates at the size of the image, filled tile by tile.

    `bits` (C, height, ceil(width / 8)) are packed along the rows, most significant bit first; `areas` (C,)
    count their pixels, `sums` (C,) add up their probabilities.
    """

    def __init__(self, count: int, size: Size) -> None:
        self.bits = np.zeros((count, size[0], -(-size[1] // 8)), np.uint8)
        self.areas, self.sums = np.zeros(count, np.int64), np.zeros(count)

    def add_tile(self, y: int, x: int, inside: NDArray[np.bool_], shares: Floats) -> None:
        """Set the pixels `inside` (C, rows, columns), from (y, x) on; `shares` are overwritten."""
        columns = slice(x // 8, -(-(x + inside.shape[2]) // 8))
        self.bits[:, y : y + inside.shape[1], columns] = np.packbits(inside, axis=-1)
        self.areas += [np.count_nonzero(mask) for mask in inside]
        shares *= inside
        self.sums += (shares @ np.ones(shares.shape[2], shares.dtype)).sum(axis=1, dtype=np.float64)

    def add_pixels(
        self, y: NDArray[np.intp], x: NDArray[np.intp], inside: NDArray[np.bool_], shares: Float64
    ) -> None:
        """Set single pixels (p,), (p,), those `inside` (C, p), none of which is set yet."""
        slot, pixel = np.nonzero(inside)
        bit = (128 >> (x[pixel] % 8)).astype(np.uint8)
        np.bitwise_or.at(self.bits, (slot, y[pixel], x[pixel] // 8), bit)
        self.areas += inside.sum(axis=1)
        self.sums += (shares * inside).sum(axis=1)

    def means(self) -> Float64:
        """Mean probability of each mask, (C,); 0 if it is empty."""
        return np.asarray(self.sums / np.maximum(self.areas, 1))


def count_bits(bits: NDArray[np.uint8]) -> int:
    """How many bits are set."""
    return int(np.count_nonzero(np.unpackbits(bits)))


def ordering_scores(candidates: Candidates, masks: BinaryMasks, mask_power: float) -> Float64:
    """Class probability ** class power * mean mask probability ** `mask_power`, (C,); 0 for an empty mask."""
    filled = masks.areas > 0
    means = np.where(filled, masks.means(), 1.0)
    return np.where(filled, candidates.class_scores * means**mask_power, 0.0)
