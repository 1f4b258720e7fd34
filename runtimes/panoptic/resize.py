"""Mask logits at the size of the image: each axis is one sparse matrix.

Enlarging to the input, cutting off the padding and resizing to the image are linear and treat rows and
columns apart, so together they are one matrix for each axis, with at most four neighbouring non-zeros in a
row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Size = tuple[int, int]

# Columns made by one matrix product; its matrix is a band, so that wider ones multiply mostly zeros.
BAND = 64
# Rows of the image, and rows of the masks that make them, worked on at a time.
STRIP, STRIP_TAPS = 32, 9
# Terms of a geometric series before it starts anew, which bounds its rounding error.
SERIES = 16


def resize_matrix(coarse: int, size: int, content: int, image: int) -> Float64:
    """(image, coarse) matrix: coarse -> size with corners aligned, cut to content, resized to image."""
    place = np.arange(content) * ((coarse - 1) / (size - 1) if size > 1 else 0.0)
    enlarge = _interpolation_matrix(place, coarse)
    # Half-pixel centres, clamped at the borders, no smoothing.
    place = np.clip((np.arange(image) + 0.5) * (content / image) - 0.5, 0, content - 1)
    first = np.minimum(place.astype(np.intp), max(content - 2, 0))
    second = np.minimum(first + 1, content - 1)
    share = (place - first)[:, None]
    return np.asarray((1 - share) * enlarge[first] + share * enlarge[second])


def _interpolation_matrix(place: Floats, count: int) -> Float64:
    """(len(place), count) matrix of linear interpolation at `place`, in 0..count-1."""
    matrix = np.zeros((len(place), count))
    first = np.minimum(place.astype(np.intp), max(count - 2, 0))
    numbers, share = np.arange(len(place)), place - first
    matrix[numbers, first] = 1 - share
    matrix[numbers, np.minimum(first + 1, count - 1)] += share
    return matrix


def nonzero_ranges(matrix: Float64) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of every row the range of columns, [low, high), that holds its non-zeros."""
    used = matrix != 0
    return used.argmax(axis=1), matrix.shape[1] - used[:, ::-1].argmax(axis=1)


def nonzero_range(matrix: Float64) -> tuple[int, int]:
    """The range of columns, [low, high), that holds all non-zeros."""
    low, high = nonzero_ranges(matrix)
    return int(low.min()), int(high.max())


class RowRun(NamedTuple):
    """Rows of the image, [start, stop), whose logits are an arithmetic series.

    `weights` make its first term, and its difference if it has several, from the masks' rows [low, high).
    """

    start: int
    stop: int
    low: int
    high: int
    weights: Floats


def row_strips(rows: Float64, dtype: np.dtype[Any]) -> list[list[RowRun]]:
    """All rows of the image as runs, in groups that are worked on together."""
    steps = np.diff(rows, axis=0)
    # Rows i, i+1 and i+2 are an arithmetic series.
    alike = np.append(np.abs(np.diff(steps, axis=0)).max(axis=1, initial=0.0) < 1e-12, [False, False])
    lows, highs = nonzero_ranges(rows)
    strips: list[list[RowRun]] = []
    start = 0
    while start < len(rows):
        stop = start + 1
        if alike[start]:
            stop += 2
            while stop < start + SERIES and alike[stop - 2]:
                stop += 1
        low, high = int(lows[start]), int(highs[stop - 1])
        weights = np.concatenate((rows[start : start + 1], steps[start : stop - 1][:1]))[:, low:high]
        run = RowRun(start, stop, low, high, weights.astype(dtype))
        first = strips[-1][0] if strips else run
        if strips and stop - first.start <= STRIP and high - first.low <= STRIP_TAPS:
            strips[-1].append(run)
        else:
            strips.append([run])
        start = stop
    return strips


def column_bands(columns: Float64, dtype: np.dtype[Any]) -> list[tuple[int, int, int, Floats]]:
    """The matrix of an axis, (columns, w), cut into (start, low, high, (high - low, columns))."""
    bands = []
    for start in range(0, len(columns), BAND):
        band = columns[start : start + BAND]
        low, high = nonzero_range(band)
        bands.append((start, low, high, np.ascontiguousarray(band[:, low:high].T, dtype)))
    return bands


def interpolate_columns(values: Floats, bands: list[tuple[int, int, int, Floats]], out: Floats) -> None:
    """Multiply (..., w) with the matrix that was cut into bands -> out (..., columns)."""
    values, out = values.reshape(-1, values.shape[-1]), out.reshape(-1, out.shape[-1])
    for x, low, high, band in bands:
        np.matmul(values[:, low:high], band, out=out[:, x : x + band.shape[1]])
