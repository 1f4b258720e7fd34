"""Mask-wise merging: the outputs of kMaX-DeepLab and ReMaX -> one panoptic segmentation.

Every slot of the network has class logits and a mask at a quarter of the input's resolution. A pixel of
the photograph belongs to a slot's binary mask where the softmax over the slots gives it more than 0.4;
slots are then painted, best score first. Two facts make that cheap without changing the result:

- Enlarging to the input, cutting off the padding and resizing to the photograph are linear and treat rows
  and columns apart, so each axis is one matrix with at most four neighbouring non-zeros in a row.
- Between two rows of the mask, logits are linear in the row number, so their exponentials are a geometric
  series: two `exp` serve all rows of the photograph that lie there.

All slots go into the softmax, in float32. Whatever rounding could decide is decided again in float64. The
fast mode stands in for slots that cannot be accepted by one map of their summed exponentials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.blas import one_blas_thread
from vitkit.runtimes.errors import BadInput, BadRequest

Size = tuple[int, int]
Floats = NDArray[np.floating[Any]]
Pixels = NDArray[np.intp]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Columns of the photograph worked on at a time: what that needs stays in the cache. A multiple of 8.
TILE = 704
# Columns made by one matrix product; its matrix is a band, so that wider ones multiply mostly zeros.
BAND = 64
# Rows of the photograph, and rows of the masks that make them, worked on at a time.
STRIP, STRIP_TAPS = 32, 9
# Terms of a geometric series before it starts anew, which bounds its rounding error.
SERIES = 16
# Pixels evaluated at a time in float64.
CHUNK = 2048
# Within this difference of logits, no exponential below overflows or vanishes.
REACH = {np.dtype(np.float32): 80.0, np.dtype(np.float64): 600.0}
FAST_REACH = REACH[np.dtype(np.float32)]


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


@dataclass
class _Candidates:
    """Slots that may be accepted: number, class, thing?, score to exceed and class's part of the score."""

    slots: NDArray[np.intp]
    classes: NDArray[np.intp]
    thing: NDArray[np.bool_]
    limits: Float64
    factors: Float64


@dataclass
class _Masks:
    """Binary masks of the candidates: bits packed along the rows, areas in pixels, sums of probability."""

    bits: NDArray[np.uint8]
    areas: NDArray[np.int64]
    sums: Float64


class _Run(NamedTuple):
    """Rows of the photograph, [start, stop), whose logits are an arithmetic series.

    `weights` make its first term, and its difference where it has several, from the masks' rows
    [low, high).
    """

    start: int
    stop: int
    low: int
    high: int
    weights: Floats


@one_blas_thread()
def merge_masks(
    class_logits: Floats,
    mask_logits: Floats,
    *,
    things: NDArray[np.bool_],
    input_size: Size,
    content: Size,
    photo_size: Size,
    parameters: MergeParameters = MergeParameters(),
    fast: bool = False,
    labels: Sequence[str] = (),
) -> Panoptic:
    """Merge the slots of one image into segments of the photograph.

    `class_logits` (N, K+1), the last for void; `mask_logits` (N, h, w), float32, of the whole input;
    `things` (K,) tells things from stuff. The network's input has `input_size` (height, width) in pixels,
    the photograph of `photo_size` fills its top left `content`. `labels` name the K classes.

    The result is that of the published merge in float64. `fast` changes some hundredths of a per cent of
    the pixels, along the borders of segments, and scores by some thousandths.
    Source: kmax-deeplab's mask-wise merge, after deeplab2's. Raises BadInput.
    """
    class_logits, mask_logits = np.asarray(class_logits), np.asarray(mask_logits, np.float32)
    things = np.asarray(things, np.bool_)
    _check(class_logits, mask_logits, things, (input_size, content, photo_size), labels)
    found = _candidates(class_logits, things, parameters)
    if not len(found.slots):
        return Panoptic(np.zeros(photo_size, np.int32), ())
    rows = _axis(mask_logits.shape[1], input_size[0], content[0], photo_size[0])
    columns = _axis(mask_logits.shape[2], input_size[1], content[1], photo_size[1])
    # Masks over the padding alone take no part.
    rows, columns = (axis[:, : _taps(axis)[1]] for axis in (rows, columns))
    logits = mask_logits[:, : rows.shape[1], : columns.shape[1]]
    if fast:
        few = np.arange(len(found.slots))
        values, others = _few(logits, found.slots, rows, columns)
        masks, _ = _masks(values, few, (rows, columns), parameters.mask_threshold, others=others)
        scores = _scores(found, masks, parameters)
    else:
        masks, scores = _exact(logits, found, (rows, columns), parameters)
    return _paint(found, masks, scores, parameters, photo_size, labels)


def _check(
    class_logits: NDArray[Any],
    mask_logits: NDArray[Any],
    things: NDArray[np.bool_],
    sizes: tuple[Size, Size, Size],
    labels: Sequence[str],
) -> None:
    if class_logits.ndim != 2 or mask_logits.ndim != 3 or len(class_logits) != len(mask_logits):
        raise BadInput(
            f"class logits {class_logits.shape} and mask logits {mask_logits.shape}; "
            "wanted (slots, classes + 1) and (slots, height, width)"
        )
    if class_logits.shape[1] < 2 or 0 in mask_logits.shape:
        raise BadInput(f"class logits {class_logits.shape}, mask logits {mask_logits.shape}: nothing there")
    if things.shape != (class_logits.shape[1] - 1,):
        raise BadInput(f"{things.shape} thing flags for {class_logits.shape[1] - 1} classes")
    if labels and len(labels) != len(things):
        raise BadInput(f"{len(labels)} labels for {len(things)} classes")
    size, content, photo = sizes
    if min(*size, *content, *photo) < 1 or content[0] > size[0] or content[1] > size[1]:
        raise BadInput(f"input {size}, its content {content} and the photo {photo} do not fit together")
    if not (np.isfinite(class_logits).all() and np.isfinite(mask_logits).all()):
        raise BadInput("the logits hold NaN or infinite values")


def _candidates(class_logits: Floats, things: NDArray[np.bool_], parameters: MergeParameters) -> _Candidates:
    """Slots whose class alone does not rule them out."""
    logits = class_logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    classes = probabilities[:, :-1].argmax(axis=1)
    thing = things[classes]
    limits = np.where(thing, parameters.thing_threshold, parameters.stuff_threshold)
    factors = probabilities[np.arange(len(classes)), classes] ** parameters.class_power
    # A mask's mean is at most 1 (plus rounding), so with a power >= 0 it cannot lift the score.
    slots = np.flatnonzero((factors * (1 + 1e-9) > limits) | (parameters.mask_power < 0))
    return _Candidates(slots, classes[slots], thing[slots], limits[slots], factors[slots])


def _axis(coarse: int, size: int, content: int, photo: int) -> Float64:
    """(photo, coarse) matrix: coarse -> size with corners aligned, cut to content, resized to photo."""
    place = np.arange(content) * ((coarse - 1) / (size - 1) if size > 1 else 0.0)
    enlarge = _linear(place, coarse)
    # Half-pixel centres, clamped at the borders, no smoothing.
    place = np.clip((np.arange(photo) + 0.5) * (content / photo) - 0.5, 0, content - 1)
    first = np.minimum(place.astype(np.intp), max(content - 2, 0))
    second = np.minimum(first + 1, content - 1)
    share = (place - first)[:, None]
    return np.asarray((1 - share) * enlarge[first] + share * enlarge[second])


def _linear(place: Floats, count: int) -> Float64:
    """(len(place), count) matrix of linear interpolation at `place`, in 0..count-1."""
    matrix = np.zeros((len(place), count))
    first = np.minimum(place.astype(np.intp), max(count - 2, 0))
    numbers, share = np.arange(len(place)), place - first
    matrix[numbers, first] = 1 - share
    matrix[numbers, np.minimum(first + 1, count - 1)] += share
    return matrix


def _ends(matrix: Float64) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of every row the range of columns, [low, high), that holds its non-zeros."""
    used = matrix != 0
    return used.argmax(axis=1), matrix.shape[1] - used[:, ::-1].argmax(axis=1)


def _taps(matrix: Float64) -> tuple[int, int]:
    """The range of columns, [low, high), that holds all non-zeros."""
    low, high = _ends(matrix)
    return int(low.min()), int(high.max())


def _strips(rows: Float64, dtype: np.dtype[Any]) -> list[list[_Run]]:
    """All rows of the photograph as runs, in groups that are worked on together."""
    steps = np.diff(rows, axis=0)
    # Rows i, i+1 and i+2 are an arithmetic series.
    alike = np.append(np.abs(np.diff(steps, axis=0)).max(axis=1, initial=0.0) < 1e-12, [False, False])
    lows, highs = _ends(rows)
    strips: list[list[_Run]] = []
    start = 0
    while start < len(rows):
        stop = start + 1
        if alike[start]:
            stop += 2
            while stop < start + SERIES and alike[stop - 2]:
                stop += 1
        low, high = int(lows[start]), int(highs[stop - 1])
        weights = np.concatenate((rows[start : start + 1], steps[start : stop - 1][:1]))[:, low:high]
        run = _Run(start, stop, low, high, weights.astype(dtype))
        first = strips[-1][0] if strips else run
        if strips and stop - first.start <= STRIP and high - first.low <= STRIP_TAPS:
            strips[-1].append(run)
        else:
            strips.append([run])
        start = stop
    return strips


def _relative(logits: Floats) -> tuple[Floats, Floats]:
    """Logits (N, h, w) less the largest of their place, as (h, N, w); and the widest gap of each row (h,)."""
    top = logits.max(axis=0)
    values = np.subtract(logits.transpose(1, 0, 2), top[:, None], order="C")
    return values, np.asarray((top - logits.min(axis=0)).max(axis=1))


class _Others(NamedTuple):
    """Log of the summed exponentials of the slots left out, at every half row of the masks.

    `values` (2h-1, photo columns) are already interpolated along the rows; `rows` (photo rows, 2h-1) does it
    along the columns.
    """

    rows: Float64
    values: Float32

    def piece(self, y: int, x: int, size: Size) -> Float32:
        """The sum itself at the photograph's pixels from (y, x) on."""
        rows = self.rows[y : y + size[0]]
        low, high = _taps(rows)
        logs = rows[:, low:high].astype(np.float32) @ self.values[low:high, x : x + size[1]]
        return np.asarray(np.exp(logs, out=logs))


def _few(
    logits: Float32, slots: NDArray[np.intp], rows: Float64, columns: Float64
) -> tuple[Float32, _Others]:
    """What `_relative` gives, of the chosen slots alone, and what stands for all others.

    Half way between two places the exponential of a logit is the product of their square roots, so that
    the sum there is exact; from there on a parabola in its logarithm is followed.
    """
    top = logits.max(axis=0)
    values = np.subtract(logits[slots].transpose(1, 0, 2), top[:, None], order="C")
    height, width = top.shape
    sums = np.empty((2 * height - 1, 2 * width - 1), np.float32)
    for y in range(0, max(height - 1, 1), STRIP_TAPS):
        block = slice(y, y + STRIP_TAPS + 1)
        part = logits[:, block] - top[block]
        part[slots] = -FAST_REACH
        _half_sums(np.clip(part, -FAST_REACH, 0, out=part), sums[2 * y : 2 * y + 2 * part.shape[1] - 1])
    across = np.empty((len(sums), len(columns)), np.float32)
    _spread(np.log(sums, out=sums), _bands(_parabolas(columns), across.dtype), across)
    return np.clip(values, -FAST_REACH, 0, out=values), _Others(_parabolas(rows), across)


def _half_sums(values: Float32, out: Float32) -> None:
    """Sum over the slots of exp(values), (C, h, w), at every half row and column -> out (2h-1, 2w-1)."""
    fourth = np.exp(np.multiply(values, np.float32(0.25), out=values), out=values)
    half = fourth * fourth
    beside = fourth[:, :, 1:] * fourth[:, :, :-1]
    out[::2, ::2] = np.einsum("cyx,cyx->yx", half, half)
    out[::2, 1::2] = np.einsum("cyx,cyx->yx", half[:, :, 1:], half[:, :, :-1])
    out[1::2, ::2] = np.einsum("cyx,cyx->yx", half[:, 1:], half[:, :-1])
    out[1::2, 1::2] = np.einsum("cyx,cyx->yx", beside[:, 1:], beside[:, :-1])


def _parabolas(axis: Float64) -> Float64:
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


def _shares(
    values: Floats, chosen: NDArray[np.intp], rows: Float64, columns: Float64, others: _Others | None
) -> Iterator[tuple[int, int, Floats]]:
    """Softmax over the slots, of the chosen ones, in pieces: first row, column, (chosen, rows, columns).

    `values` (h, C, w) are logits less any number that all slots of a place share, within -REACH..0.
    Where `others` join them, all of them are chosen.
    """
    strips = _strips(rows, values.dtype)
    taps = max(run.high - strip[0].low for strip in strips for run in strip)
    for x0 in range(0, len(columns), TILE):
        bands = _bands(columns[x0 : x0 + TILE], values.dtype)
        width = min(TILE, len(columns) - x0)
        # Memory that was in use a moment ago is in the cache, and need not be asked of the system.
        across = np.empty((taps, values.shape[1], width), values.dtype)
        terms = np.empty((2 if others is None else STRIP, values.shape[1], width), values.dtype)
        for strip in strips:
            y0, low, height = strip[0].start, strip[0].low, strip[-1].stop - strip[0].start
            high = max(run.high for run in strip)
            _spread(values[low:high], bands, across[: high - low])
            piece = np.empty((len(chosen), height, width), values.dtype)
            if others is None:
                for run in strip:
                    first = _terms(run.weights, across[run.low - low : run.high - low], terms)
                    _series(first, chosen, piece[:, run.start - y0 : run.stop - y0])
            else:
                weights = rows[y0 : y0 + height, low:high].astype(values.dtype)
                all_rows = _terms(weights, across[: high - low], terms)
                total = all_rows.sum(axis=1) + others.piece(y0, x0, (height, width))
                np.multiply(all_rows.transpose(1, 0, 2), np.reciprocal(total), out=piece)
            yield y0, x0, piece


def _bands(columns: Float64, dtype: np.dtype[Any]) -> list[tuple[int, int, int, Floats]]:
    """The matrix of an axis, (columns, w), cut into (start, low, high, (high - low, columns))."""
    bands = []
    for start in range(0, len(columns), BAND):
        band = columns[start : start + BAND]
        low, high = _taps(band)
        bands.append((start, low, high, np.ascontiguousarray(band[:, low:high].T, dtype)))
    return bands


def _spread(values: Floats, bands: list[tuple[int, int, int, Floats]], out: Floats) -> None:
    """Multiply (..., w) with the matrix that was cut into bands -> out (..., columns)."""
    values, out = values.reshape(-1, values.shape[-1]), out.reshape(-1, out.shape[-1])
    for x, low, high, band in bands:
        np.matmul(values[:, low:high], band, out=out[:, x : x + band.shape[1]])


def _terms(weights: Floats, taps: Floats, out: Floats) -> Floats:
    """Exponentials of weighted sums of taps, (r, t) and (t, C, w) -> (r, C, w), in the memory of `out`."""
    out = out[: len(weights)]
    np.matmul(weights, taps.reshape(len(taps), -1), out=out.reshape(len(out), -1))
    return np.exp(out, out=out)


def _series(terms: Floats, chosen: NDArray[np.intp], out: Floats) -> None:
    """First terms and ratios (1 or 2, C, w) -> softmax of the chosen slots (chosen, rows, w) in a run."""
    term, ratio = terms[0], terms[-1]
    ones = np.ones(len(term), term.dtype)
    for row in range(out.shape[1]):
        if row:
            term *= ratio
        np.multiply(term[chosen], np.reciprocal(ones @ term), out=out[:, row])


def _masks(
    values: Floats,
    chosen: NDArray[np.intp],
    axes: tuple[Float64, Float64],
    threshold: float,
    *,
    others: _Others | None = None,
    slack: float = 0.0,
    skip: NDArray[np.bool_] | None = None,
) -> tuple[_Masks, Pixels]:
    """Binary masks of the chosen slots, and pixels (n, 2) that no mask has, since they are not settled.

    These are the pixels within `slack` (relative) of the threshold, and the rows to `skip` (photo rows,).
    """
    height, width = (len(axis) for axis in axes)
    bits = np.zeros((len(chosen), height, -(-width // 8)), np.uint8)
    sums, unsettled = np.zeros(len(chosen)), [np.zeros((0, 2), np.intp)]
    below, above = (values.dtype.type(threshold * (1 + sign * slack)) for sign in (-1, 1))
    for y, x, piece in _shares(values, chosen, *axes, others):
        rows, columns = slice(y, y + piece.shape[1]), slice(x // 8, -(-(x + piece.shape[2]) // 8))
        inside = piece > above
        if skip is not None:
            near = ((piece > below) != inside).any(axis=0) | skip[rows, None]
            inside[:, near] = False
            unsettled.append(np.add(np.argwhere(near), (y, x)))
        bits[:, rows, columns] = np.packbits(inside, axis=-1)
        piece *= inside
        sums += (piece @ np.ones(piece.shape[2], piece.dtype)).sum(axis=1, dtype=np.float64)
    areas = np.array([_count(mask) for mask in bits])
    return _Masks(bits, areas, sums), np.concatenate(unsettled)


def _count(bits: NDArray[np.uint8]) -> int:
    return int(np.count_nonzero(np.unpackbits(bits)))


def _exact(
    logits: Float32, found: _Candidates, axes: tuple[Float64, Float64], parameters: MergeParameters
) -> tuple[_Masks, Float64]:
    """Binary masks and scores, of which every decision that follows is that of float64."""
    values, gaps = _relative(logits)
    if gaps.max() > REACH[values.dtype]:
        values, gaps = _relative(logits.astype(np.float64))
    reach = REACH[values.dtype]
    steep = gaps > reach
    if steep.any():
        np.clip(values, -reach, 0, out=values)
    # A generous sum of all roundings: some move a logit by epsilons of its size (weights are within 0..1),
    # some move a term, or the sum of all, by epsilons of its own.
    slack = float(np.finfo(values.dtype).eps) * (150 + 20 * min(float(gaps.max()), reach))
    skip = np.asarray(axes[0][:, steep].any(axis=1))
    masks, pixels = _masks(values, found.slots, axes, parameters.mask_threshold, slack=slack, skip=skip)
    del values
    sampler = _Sampler(logits, *axes)
    for start in range(0, len(pixels), CHUNK):
        y, x = pixels[start : start + CHUNK].T
        _settle(masks, y, x, sampler.softmax(y, x)[found.slots], parameters.mask_threshold)
    for i in _doubtful(found, masks, parameters, slack):
        masks.sums[i] = sampler.total(int(found.slots[i]), masks.bits[i])
    return masks, _scores(found, masks, parameters)


def _settle(masks: _Masks, y: Pixels, x: Pixels, shares: Float64, threshold: float) -> None:
    """Add pixels (p,), (p,) with shares (chosen, p) to the masks."""
    inside = shares > threshold
    slot, pixel = np.nonzero(inside)
    bit = (128 >> (x[pixel] % 8)).astype(np.uint8)
    np.bitwise_or.at(masks.bits, (slot, y[pixel], x[pixel] // 8), bit)
    masks.areas += inside.sum(axis=1)
    masks.sums += (shares * inside).sum(axis=1)


def _scores(found: _Candidates, masks: _Masks, parameters: MergeParameters) -> Float64:
    means = np.where(masks.areas > 0, masks.sums / np.maximum(masks.areas, 1), 1.0)
    return np.where(masks.areas > 0, found.factors * means**parameters.mask_power, 0.0)


def _doubtful(
    found: _Candidates, masks: _Masks, parameters: MergeParameters, slack: float
) -> NDArray[np.intp]:
    """Candidates whose acceptance, or order where it matters, rounding could change."""
    scores = _scores(found, masks, parameters)
    # An error of x in the odds moves a share p by x p (1 - p); 1e-5 is for the sums.
    error = slack * (1 - np.minimum(masks.sums / np.maximum(masks.areas, 1), 1)) + 1e-5
    error *= abs(parameters.mask_power) * scores
    doubtful = np.abs(scores - found.limits) < error
    close = np.abs(scores[:, None] - scores) < error[:, None] + error
    for i, j in np.argwhere(np.triu(close, 1)):
        # The order of two slots without a common pixel has no effect.
        if (masks.bits[i] & masks.bits[j]).any():
            doubtful[[i, j]] = True
    return np.flatnonzero(doubtful)


class _Sampler:
    """The definition itself, in float64, at single pixels of the photograph."""

    def __init__(self, logits: Float32, rows: Float64, columns: Float64) -> None:
        self.logits = logits
        self.rows, self.columns = self._table(rows), self._table(columns)

    @staticmethod
    def _table(matrix: Float64) -> tuple[NDArray[np.intp], Float64]:
        """The matrix of an axis (n, w) as the numbers and weights of its non-zeros, both (n, up to 4)."""
        low, high = _ends(matrix)
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


@dataclass
class _Part:
    """A segment in the making: class, thing?, score, and its pixels as packed bits."""

    index: int
    thing: bool
    score: float
    bits: NDArray[np.uint8]


def _paint(
    found: _Candidates,
    masks: _Masks,
    scores: Float64,
    parameters: MergeParameters,
    photo_size: Size,
    labels: Sequence[str],
) -> Panoptic:
    """Accept slots, best first, and write their free pixels."""
    free = np.full(masks.bits.shape[1:], 255, np.uint8)
    parts: dict[tuple[bool, int], _Part] = {}
    for i in np.argsort(-scores, kind="stable"):
        bits = masks.bits[i] & free
        if not (scores[i] > found.limits[i] and _count(bits) > parameters.overlap * masks.areas[i]):
            continue
        free &= ~bits
        thing, index = bool(found.thing[i]), int(found.classes[i])
        key = (thing, int(i) if thing else index)
        if key in parts:
            parts[key].bits |= bits
        else:
            parts[key] = _Part(index, thing, float(scores[i]), bits)
    areas = {key: _count(part.bits) for key, part in parts.items()}
    ids, segments = np.zeros(photo_size, np.int32), list[Segment]()
    for key in sorted(parts, key=lambda key: (-areas[key], key)):
        part, area = parts[key], areas[key]
        if area < (parameters.thing_area if part.thing else parameters.stuff_area):
            continue
        label = labels[part.index] if labels else str(part.index)
        segments.append(Segment(len(segments) + 1, part.index, label, part.thing, part.score, area))
        used = np.flatnonzero(part.bits.any(axis=1))
        rows = slice(int(used[0]), int(used[-1]) + 1)
        inside = np.unpackbits(part.bits[rows], axis=-1, count=photo_size[1]).view(np.bool_)
        np.copyto(ids[rows], len(segments), where=inside)
    return Panoptic(ids, tuple(segments))
