"""Segment ids as colours of a PNG: reading, writing, and measuring what they mark."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.data.coco import Box, SegmentInfo
from vitkit.runtimes.errors import BadInput, BadRequest

Ids = NDArray[np.int32]

# Three bytes of a pixel.
MAX_ID = 2**24 - 1


def read_ids(path: Path) -> Ids:
    """The segment ids of a PNG, (H, W) int32: R + 256 G + 65536 B. Alpha and EXIF tags are ignored.

    Raises BadInput if the file cannot be read, or is not RGB(A) with 8 bits a channel.
    """
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            # Pillow calls 16-bit colour plain RGB; the decoder's raw mode has the depth.
            if image.mode not in ("RGB", "RGBA") or any(";16" in str(tile[3]) for tile in image.tile):
                raise BadInput(
                    f"{path} is no image of segment ids: it must be RGB with 8 bits a channel, "
                    f"its mode is {image.mode} ({image.format})"
                )
            pixels = np.asarray(image)
    except BadInput:
        raise
    # Pillow's decoders raise many types on hostile bytes (SyntaxError, struct.error, ValueError, ...).
    except Exception as error:
        raise BadInput(f"{path} cannot be read as an image: {error}") from None
    padded = np.zeros((*pixels.shape[:2], 4), np.uint8)
    padded[..., :3] = pixels[..., :3]
    return padded.view("<i4")[..., 0].astype(np.int32)


def write_ids(path: Path, ids: NDArray[np.integer[Any]]) -> None:
    """Write (H, W) segment ids as a PNG, whole or not at all.

    Raises BadInput if `ids` is not a two-dimensional array of 0..2^24 - 1, BadRequest if the file
    cannot be written.
    """
    import PIL.Image

    check_ids(ids, f"the ids for {path}")
    pixels = np.ascontiguousarray(ids, "<i4").view(np.uint8).reshape(*ids.shape, 4)[..., :3]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BadRequest(f"cannot write {path}: {error}") from None


def check_ids(ids: NDArray[np.integer[Any]], what: str) -> None:
    """Raises BadInput if `ids` is not a filled (H, W) array of integers from 0 to 2^24 - 1."""
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise BadInput(f"{what}: shape {ids.shape} of {ids.dtype}; it must be integers, (height, width)")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > MAX_ID:
        raise BadInput(f"{what}: id {low if low < 0 else high} is outside 0 to {MAX_ID}, what a PNG holds")


def measure_segments(ids: NDArray[np.integer[Any]]) -> dict[int, tuple[int, Box]]:
    """Id -> (pixels, box as (x, y, width, height)) of everything in (H, W) `ids` but void."""
    height, width = ids.shape
    found = np.unique(ids)
    # Untouched pages of such a table cost nothing; sorting every pixel would.
    table = np.zeros(int(found[-1]) + 1, np.int32)
    table[found] = np.arange(len(found))
    index = table[ids]
    by_row, by_column = index.ravel(), index.T.ravel()
    rows, columns = np.repeat(np.arange(height), width), np.repeat(np.arange(width), height)
    areas = np.bincount(by_row, minlength=len(found))
    # Of several writes to one place the last one stays: the lowest row, and backwards the highest.
    top, bottom, left, right = np.empty((4, len(found)), np.int64)
    top[by_row[::-1]], bottom[by_row] = rows[::-1], rows
    left[by_column[::-1]], right[by_column] = columns[::-1], columns
    boxes = np.stack([left, top, right - left + 1, bottom - top + 1], axis=1).tolist()
    measured = zip(found.tolist(), areas.tolist(), boxes, strict=True)
    return {number: (area, (x, y, w, h)) for number, area, (x, y, w, h) in measured if number}


def describe_segments(
    ids: NDArray[np.integer[Any]], categories: Mapping[int, int], crowds: Collection[int] = ()
) -> tuple[SegmentInfo, ...]:
    """The segments in (H, W) `ids`, measured, by id; `categories` maps ids to category ids.

    Raises BadInput if an id of the map has no category.
    """
    measured = measure_segments(ids)
    if unknown := sorted(measured.keys() - categories.keys()):
        raise BadInput(f"{first_few(unknown)} in the map of segments: no category was given")
    return tuple(
        SegmentInfo(number, categories[number], area, number in crowds, box)
        for number, (area, box) in measured.items()
    )


def first_few(items: Sequence[object]) -> str:
    """The first five items as text, and how many more there are."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(map(str, items[:5])) + more
