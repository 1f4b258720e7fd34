"""Binary masks whose every pixel is that of the published merge in float64.

They are made in float32; whatever rounding could decide is decided again in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.panoptic.masks import BinaryMasks, Candidates, ordering_scores
from vitkit.runtimes.panoptic.resize import STRIP, Float32, Float64, Floats, nonzero_ranges
from vitkit.runtimes.panoptic.results import MergeParameters
from vitkit.runtimes.panoptic.softmax import softmax_tiles

Pixels = NDArray[np.intp]

# Pixels evaluated at a time in float64.
CHUNK = 2048
# Within this difference of logits, no exponential below overflows or vanishes.
REACH = {np.dtype(np.float32): 80.0, np.dtype(np.float64): 600.0}


def find_masks(
    logits: Float32, candidates: Candidates, rows: Float64, columns: Float64, parameters: MergeParameters
) -> BinaryMasks:
    """Binary masks of the candidates, with sums that order the slots as float64 does.

    `logits` (N, h, w) of all slots; `rows` (height, h) and `columns` (width, w) resize them to the image.
    """
    values, gaps = _subtract_largest(logits)
    if gaps.max() > REACH[values.dtype]:
        values, gaps = _subtract_largest(logits.astype(np.float64))
    reach = REACH[values.dtype]
    steep = gaps > reach
    if steep.any():
        np.clip(values, -reach, 0, out=values)
    # A generous sum of all roundings: some move a logit by epsilons of its size (weights are within 0..1),
    # some move a term, or the sum of all, by epsilons of its own.
    slack = float(np.finfo(values.dtype).eps) * (150 + 20 * min(float(gaps.max()), reach))
    steep_rows = np.asarray(rows[:, steep].any(axis=1))
    threshold = parameters.mask_threshold
    below, above = (values.dtype.type(threshold * (1 + sign * slack)) for sign in (-1, 1))
    masks = BinaryMasks(len(candidates.slots), (len(rows), len(columns)))
    unsettled = []
    for y, x, shares in softmax_tiles(values, candidates.slots, rows, columns):
        inside = shares > above
        near = ((shares > below) != inside).any(axis=0) | steep_rows[y : y + shares.shape[1], None]
        inside[:, near] = False
        unsettled.append(np.add(np.argwhere(near), (y, x)))
        masks.add_tile(y, x, inside, shares)
    del values
    pixels, sampler = np.concatenate(unsettled), _Sampler(logits, rows, columns)
    for start in range(0, len(pixels), CHUNK):
        ys, xs = pixels[start : start + CHUNK].T
        exact = sampler.softmax(ys, xs)[candidates.slots]
        masks.add_pixels(ys, xs, exact > threshold, exact)
    for i in _undecided(candidates, masks, parameters, slack):
        masks.sums[i] = sampler.total(int(candidates.slots[i]), masks.bits[i])
    return masks


def _subtract_largest(logits: Floats) -> tuple[Floats, Floats]:
    """Logits (N, h, w) less the largest of their place, as (h, N, w); and the widest gap of each row (h,)."""
    top = logits.max(axis=0)
    values = np.subtract(logits.transpose(1, 0, 2), top[:, None], order="C")
    return values, np.asarray((top - logits.min(axis=0)).max(axis=1))


def _undecided(
    candidates: Candidates, masks: BinaryMasks, parameters: MergeParameters, slack: float
) -> NDArray[np.intp]:
    """Candidates whose order, if it matters, rounding could change."""
    scores = ordering_scores(candidates, masks, parameters.mask_power)
    # An error of x in the odds moves a share p by x p (1 - p); 1e-5 is for the sums.
    error = slack * (1 - np.minimum(masks.means(), 1)) + 1e-5
    error *= parameters.mask_power * scores
    undecided = np.zeros(len(scores), np.bool_)
    close = np.abs(scores[:, None] - scores) < error[:, None] + error
    for i, j in np.argwhere(np.triu(close, 1)):
        # The order of two slots without a common pixel has no effect.
        if (masks.bits[i] & masks.bits[j]).any():
            undecided[[i, j]] = True
    return np.flatnonzero(undecided)


class _Sampler:
    """The definition itself, in float64, at single pixels of the image."""

    def __init__(self, logits: Float32, rows: Float64, columns: Float64) -> None:
        self.logits = logits
        self.rows, self.columns = self._table(rows), self._table(columns)

    @staticmethod
    def _table(matrix: Float64) -> tuple[NDArray[np.intp], Float64]:
        """The matrix of an axis (n, w) as the numbers and weights of its non-zeros, both (n, up to 4)."""
        low, high = nonzero_ranges(matrix)
        count = int((high - low).max())
        numbers = np.minimum(low, matrix.shape[1] - count)[:, None] + np.arange(count)
        return numbers, np.take_along_axis(matrix, numbers, axis=1)

    def softmax(self, y: Pixels, x: Pixels) -> Float64:
        """Pixels (p,), (p,) -> their softmax over all slots (N, p)."""
        logits = np.zeros((len(self.logits), len(y)))
        for row, row_weight in zip(self.rows[0][y].T, self.rows[1][y].T, strict=True):
            for column, weight in zip(self.columns[0][x].T, self.columns[1][x].T, strict=True):
                logits += (row_weight * weight) * self.logits[:, row, column]
        logits -= logits.max(axis=0)
        np.exp(logits, out=logits)
        return np.asarray(logits / logits.sum(axis=0))

    def total(self, slot: int, bits: NDArray[np.uint8]) -> float:
        """The sum of a slot's softmax over a packed mask."""
        total = 0.0
        for top in range(0, len(bits), STRIP):
            y, x = np.nonzero(np.unpackbits(bits[top : top + STRIP], axis=-1))
            for start in range(0, len(y), CHUNK):
                part = slice(start, start + CHUNK)
                total += float(self.softmax(y[part] + top, x[part])[slot].sum())
        return total
