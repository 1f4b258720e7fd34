"""The softmax over the slots at the size of the image, tile by tile.

Between two rows of the masks, logits are linear in the row number, so their exponentials are a geometric
series: two `exp` serve all rows of the image between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.panoptic.resize import (
    Float64,
    Floats,
    Size,
    column_bands,
    interpolate_columns,
    row_strips,
)

# Columns of the image worked on at a time: what that needs stays in the cache. A multiple of 8.
TILE = 704


def softmax_tiles(
    values: Floats,
    slots: NDArray[np.intp] | slice,
    rows: Float64,
    columns: Float64,
    other_sums: Callable[[int, int, Size], Floats] | None = None,
) -> Iterator[tuple[int, int, Floats]]:
    """Softmax of the chosen slots, in tiles: first row, first column, (slots, rows, columns).

    `values` (h, C, w) are logits less any number that all slots of a place share, and small enough for their
    exponentials. The softmax is over these C slots; `other_sums(y, x, size)` adds the exponentials of more.
    """
    strips, count = row_strips(rows, values.dtype), len(np.arange(values.shape[1])[slots])
    taps = max(run.high - strip[0].low for strip in strips for run in strip)
    for x in range(0, len(columns), TILE):
        bands = column_bands(columns[x : x + TILE], values.dtype)
        width = min(TILE, len(columns) - x)
        # Memory that was in use a moment ago is in the cache, and need not be asked of the system.
        across = np.empty((taps, values.shape[1], width), values.dtype)
        terms = np.empty((2, values.shape[1], width), values.dtype)
        for strip in strips:
            y, low, height = strip[0].start, strip[0].low, strip[-1].stop - strip[0].start
            high = max(run.high for run in strip)
            interpolate_columns(values[low:high], bands, across[: high - low])
            others = other_sums(y, x, (height, width)) if other_sums else np.zeros((height, 1), values.dtype)
            shares = np.empty((count, height, width), values.dtype)
            for run in strip:
                part = slice(run.start - y, run.stop - y)
                first = _exponentials(run.weights, across[run.low - low : run.high - low], terms)
                _softmax_of_run(first, slots, others[part], shares[:, part])
            yield y, x, shares


def _exponentials(weights: Floats, values: Floats, out: Floats) -> Floats:
    """Exponentials of weighted sums of rows, (r, t) and (t, C, w) -> (r, C, w), in the memory of `out`."""
    out = out[: len(weights)]
    np.matmul(weights, values.reshape(len(values), -1), out=out.reshape(len(out), -1))
    return np.exp(out, out=out)


def _softmax_of_run(terms: Floats, slots: NDArray[np.intp] | slice, others: Floats, out: Floats) -> None:
    """First terms and ratios (1 or 2, C, w) -> softmax of the chosen slots (slots, rows, w) in a run."""
    term, ratio = terms[0], terms[-1]
    ones = np.ones(len(term), term.dtype)
    for row in range(out.shape[1]):
        if row:
            term *= ratio
        np.multiply(term[slots], np.reciprocal(ones @ term + others[row]), out=out[:, row])
