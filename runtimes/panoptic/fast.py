"""Binary masks with an approximate softmax: one map stands in for all slots that are no candidates.

That map is the logarithm of their summed exponentials, known exactly at every half step between the mask's
rows and columns and followed by parabolas from there on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.panoptic.masks import BinaryMasks, Candidates
from vitkit.runtimes.panoptic.resize import (
    STRIP_TAPS,
    Float32,
    Float64,
    Size,
    column_bands,
    interpolate_columns,
    nonzero_range,
)
from vitkit.runtimes.panoptic.results import MergeParameters
from vitkit.runtimes.panoptic.softmax import softmax_tiles

# Within this difference of logits, no float32 exponential below overflows or vanishes.
REACH = 80.0


def find_masks(
    logits: Float32, candidates: Candidates, rows: Float64, columns: Float64, parameters: MergeParameters
) -> BinaryMasks:
    """Binary masks of the candidates, some of whose pixels at the borders differ from the published merge.

    `logits` (N, h, w) of all slots; `rows` (height, h) and `columns` (width, w) resize them to the image.
    """
    values, others = _split(logits, candidates.slots, rows, columns)
    masks = BinaryMasks(len(candidates.slots), (len(rows), len(columns)))
    for y, x, shares in softmax_tiles(values, slice(None), rows, columns, others.sums):
        masks.add_tile(y, x, shares > np.float32(parameters.mask_threshold), shares)
    return masks


class _OtherSlots(NamedTuple):
    """Log of the summed exponentials of all slots but the candidates, at every half row of the masks.

    `values` (2h-1, image columns) are already interpolated along the rows; `rows` (image rows, 2h-1) does it
    along the columns.
    """

    rows: Float64
    values: Float32

    def sums(self, y: int, x: int, size: Size) -> Float32:
        """The sums themselves at the image's pixels from (y, x) on."""
        rows = self.rows[y : y + size[0]]
        low, high = nonzero_range(rows)
        logs = rows[:, low:high].astype(np.float32) @ self.values[low:high, x : x + size[1]]
        return np.asarray(np.exp(logs, out=logs))


def _split(
    logits: Float32, slots: NDArray[np.intp], rows: Float64, columns: Float64
) -> tuple[Float32, _OtherSlots]:
    """The candidates' logits less the largest of their place, (h, C, w), and what stands for all others.

    Half way between two places the exponential of a logit is the product of their square roots, so that
    the sum there is exact.
    """
    top = logits.max(axis=0)
    values = np.subtract(logits[slots].transpose(1, 0, 2), top[:, None], order="C")
    height, width = top.shape
    sums = np.empty((2 * height - 1, 2 * width - 1), np.float32)
    for y in range(0, max(height - 1, 1), STRIP_TAPS):
        block = slice(y, y + STRIP_TAPS + 1)
        part = logits[:, block] - top[block]
        part[slots] = -REACH
        _half_step_sums(np.clip(part, -REACH, 0, out=part), sums[2 * y : 2 * y + 2 * part.shape[1] - 1])
    across = np.empty((len(sums), len(columns)), np.float32)
    bands = column_bands(_quadratic_matrix(columns), across.dtype)
    interpolate_columns(np.log(sums, out=sums), bands, across)
    return np.clip(values, -REACH, 0, out=values), _OtherSlots(_quadratic_matrix(rows), across)


def _half_step_sums(values: Float32, out: Float32) -> None:
    """Sum over the slots of exp(values), (C, h, w), at every half row and column -> out (2h-1, 2w-1)."""
    fourth = np.exp(np.multiply(values, np.float32(0.25), out=values), out=values)
    half = fourth * fourth
    beside = fourth[:, :, 1:] * fourth[:, :, :-1]
    out[::2, ::2] = np.einsum("cyx,cyx->yx", half, half)
    out[::2, 1::2] = np.einsum("cyx,cyx->yx", half[:, :, 1:], half[:, :, :-1])
    out[1::2, ::2] = np.einsum("cyx,cyx->yx", half[:, 1:], half[:, :-1])
    out[1::2, 1::2] = np.einsum("cyx,cyx->yx", beside[:, 1:], beside[:, :-1])


def _quadratic_matrix(axis: Float64) -> Float64:
    """The matrix of an axis, (n, w), as one that works on half steps, (n, 2w-1), by parabolas."""
    count = axis.shape[1]
    place = axis @ np.arange(count)
    first = np.minimum(place.astype(np.intp), max(count - 2, 0))
    share, numbers = place - first, np.arange(len(axis))
    matrix = np.zeros((len(axis), max(2 * count - 1, 3)))
    matrix[numbers, 2 * first] = (1 - share) * (1 - 2 * share)
    matrix[numbers, 2 * first + 1] = 4 * share * (1 - share)
    matrix[numbers, 2 * first + 2] = share * (2 * share - 1)
    return matrix[:, : 2 * count - 1]
