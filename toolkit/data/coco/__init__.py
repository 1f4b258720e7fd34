"""COCO's panoptic format, the one layout of panoptic data on disk: reading, writing and checking it.

    DIR/annotations/panoptic_<split>.json    categories, images, and the segments of every image
    DIR/annotations/panoptic_<split>/*.png   segment ids as colours: id = R + 256 G + 65536 B, 0 is void
    DIR/<split>/*                            the images

The panoptic_<split>.json files with their PNG folders may also be directly in DIR, and the images then
in DIR/input_images. The format: https://cocodataset.org/#format-data, "Panoptic Segmentation".
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Category:
    """A class of segments: things, which are counted, or stuff. `colour` is RGB, 0..255."""

    id: int
    name: str
    thing: bool
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class SegmentInfo:
    """One segment of the truth or of a prediction on disk; `id` is its value in the PNG (1..2^24 - 1).

    `area` is in pixels, `box` (x, y, width, height); None if the JSON leaves them out, since the PNG has
    both. A `crowd` is a region of instances that are not told apart. `score` belongs to predictions.
    """

    id: int
    category_id: int
    area: int | None = None
    crowd: bool = False
    box: Box | None = None
    score: float | None = None


@dataclass(frozen=True)
class PanopticImage:
    """An image `file`, the PNG of its segment ids `mask`, their size in pixels, and the segments.

    `height` and `width` are None if the JSON leaves them out.
    """

    image_id: int | str
    file: Path
    mask: Path
    height: int | None
    width: int | None
    segments: tuple[SegmentInfo, ...]


@dataclass(frozen=True)
class PanopticSet:
    """One split: categories by id, images by file name, and the JSON it was read from."""

    categories: tuple[Category, ...]
    images: tuple[PanopticImage, ...]
    source: Path


def default_colour(number: int) -> tuple[int, int, int]:
    """An RGB colour for a category without one, the same for the same id."""
    # Steps of the golden ratio: neighbours in number are far apart in hue.
    hue, value = (number * 0.6180339887) % 1, 0.55 + 0.45 * ((number * 0.7548776662) % 1)
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, value))
    return red, green, blue
