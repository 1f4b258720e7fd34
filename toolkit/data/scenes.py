"""A small panoptic set drawn by arithmetic: overlapping shapes over regions of textured stuff.

Things are recognised by their outlines, told apart by their colours, and hide each other in part; stuff is
recognised by colour and texture. Every image is drawn from its own random numbers (seed, split, index):
asking for more images leaves the earlier ones as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.random import Generator
from numpy.typing import NDArray

from vitkit.data.coco import Category, SegmentInfo
from vitkit.data.coco.ids import describe_segments
from vitkit.data.coco.write import NewImage, check_new_folder, write_panoptic_set
from vitkit.data.shapes import OUTLINES, place_outline
from vitkit.runtimes.errors import BadRequest

Array = NDArray[Any]

MIN_SIZE = 32
# Outlines are filled this many times larger, then averaged: the share of a pixel that a shape covers.
_SUPERSAMPLE = 3
_SPLITS = ("train", "val")
_MAX_THINGS = 7
# Radius of a thing as a part of the image side.
_RADIUS = (0.1, 0.24)
# Centres of two things are this far apart, of the sum of their radii, if there is room: most of every
# thing stays visible.
_APART = 0.6
# Places and colours are the best, or the first good one, of so many.
_TRIES = 12
# Segments with a smaller part of the image become void.
_MIN_AREA = 0.001
# Standard deviation of the noise, of 0..255.
_NOISE = 8.0

# The ids have a gap, as COCO's have: who takes an id for an index fails here already. The red of a
# colour leaves room for the numbers of instances (see _segment_ids), and no two share green and blue.
THINGS: tuple[Category, ...] = (
    Category(1, "circle", True, (220, 20, 60)),
    Category(2, "cross", True, (120, 60, 200)),
    Category(3, "square", True, (230, 140, 20)),
    Category(4, "star", True, (240, 220, 50)),
    Category(5, "triangle", True, (230, 80, 170)),
)
STUFF: tuple[Category, ...] = (
    Category(21, "brick", False, (150, 90, 70)),
    Category(22, "grass", False, (110, 150, 40)),
    Category(23, "sky", False, (150, 200, 240)),
    Category(24, "water", False, (40, 100, 150)),
)
CATEGORIES: tuple[Category, ...] = THINGS + STUFF


def _grid(size: int) -> tuple[Array, Array]:
    line = np.arange(size, dtype=np.float32)
    return line[:, None], line[None, :]


def _smooth_noise(rng: Generator, size: int, cells: int) -> Array:
    """(size, size) of noise in -1..1 whose hills are size / cells pixels wide."""
    coarse = PIL.Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), PIL.Image.Resampling.BICUBIC))


def _brick(rng: Generator, size: int) -> Array:
    y, x = _grid(size)
    tall = size * rng.uniform(0.06, 0.1)
    wide, joint = 2.2 * tall, max(1.0, 0.18 * tall)
    y = y + rng.uniform(0, tall)
    row = np.floor(y / tall).astype(int)
    along = x + rng.uniform(0, wide) + (row % 2) * wide / 2
    column = np.floor(along / wide).astype(int)
    shades = rng.uniform(-18, 18, (row.max() + 1, column.max() + 1))
    mortar = ((y % tall) < joint) | ((along % wide) < joint)
    colour = rng.uniform((140, 60, 40), (190, 95, 75))
    pixels: Array = colour + shades[row, column][..., None]
    pixels[np.broadcast_to(mortar, (size, size))] = rng.uniform(165, 205)
    return pixels


def _grass(rng: Generator, size: int) -> Array:
    blade = max(2, size // 20)
    stripes = rng.normal(0, 26, (size // blade + 1, size)).repeat(blade, axis=0)[:size]
    colour = rng.uniform((45, 115, 25), (95, 165, 65))
    pixels: Array = colour + stripes[..., None] * np.array([0.8, 1.0, 0.5])
    return pixels


def _sky(rng: Generator, size: int) -> Array:
    y, _ = _grid(size)
    top, bottom = rng.uniform((70, 130, 205), (120, 175, 245)), rng.uniform((165, 200, 230), (215, 235, 255))
    clouds = 22 * _smooth_noise(rng, size, 4)
    pixels: Array = top + (bottom - top) * (y / size)[..., None] + clouds[..., None]
    return pixels


def _water(rng: Generator, size: int) -> Array:
    y, x = _grid(size)
    length, swell = size * rng.uniform(0.07, 0.12), size * rng.uniform(0.2, 0.4)
    bend = rng.uniform(0.2, 0.4) * np.sin(2 * np.pi * (x / swell + rng.uniform()))
    waves = np.sin(2 * np.pi * (y / length + bend)) + 0.3 * _smooth_noise(rng, size, 8)
    pixels: Array = rng.uniform((10, 70, 110), (50, 110, 160)) + 32 * waves[..., None]
    return pixels


_TEXTURES: tuple[Callable[[Generator, int], Array], ...] = (_brick, _grass, _sky, _water)


def _regions(rng: Generator, size: int) -> Array:
    """(size, size) of 0, 1 and often 2: bands across the image, with curved borders."""
    y, x = (part / size - 0.5 for part in _grid(size))
    angle = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    for bend, waves in (((0.03, 0.10), (0.5, 1.5)), ((0.01, 0.04), (2.0, 4.0))):
        turns = rng.uniform(*waves) * across + rng.uniform()
        along = along + rng.uniform(*bend) * np.sin(2 * np.pi * turns)
    cuts = [rng.uniform(0.3, 0.7)] if rng.integers(2) else [rng.uniform(0.25, 0.4), rng.uniform(0.6, 0.75)]
    regions: Array = np.searchsorted(np.quantile(along, cuts), along)
    return regions


def _centre(rng: Generator, size: int, radius: float, others: list[tuple[Array, float]]) -> Array:
    centres = rng.uniform(0.6 * radius, size - 0.6 * radius, (_TRIES, 2))
    room = np.full(_TRIES, np.inf)
    for place, extent in others:
        room = np.minimum(room, np.linalg.norm(centres - place, axis=1) / (radius + extent))
    good = np.nonzero(room > _APART)[0]
    best: Array = centres[good[0] if len(good) else room.argmax()]
    return best


def _unlike(rng: Generator, used: list[Array]) -> Array:
    """The colour, of several, that is farthest from those used in the image."""
    colours = rng.uniform(15, 255, (_TRIES, 3))
    distance = np.abs(colours[:, None] - np.array(used)).sum(axis=2).min(axis=1)
    best: Array = colours[distance.argmax()]
    return best


def _surface(name: str, y: Array, x: Array) -> Array:
    """Brightness (0..1) of a thing's surface; `y` and `x` count radii from its centre.

    Things differ in more than their outline, as real ones do: a small network learns that in minutes.
    """
    distance = np.hypot(y, x)
    surfaces = {
        "circle": 1 - 0.65 * distance**2,
        "cross": np.ones_like(distance),
        "square": 0.55 + 0.45 * ((np.floor(2 * y) + np.floor(2 * x)) % 2),
        "star": 0.45 + 0.75 * distance,
        "triangle": 0.72 + 0.28 * np.sign(np.sin(3 * np.pi * y)),
    }
    bright: Array = surfaces[name].clip(0.2, 1)
    return bright


def _cover(points: list[tuple[float, float]], size: int) -> tuple[slice, slice, Array]:
    """Rows and columns around an outline given in pixels (x, y), and how much of each pixel it covers."""
    x, y = np.array(points).T
    left, top = max(0, int(x.min())), max(0, int(y.min()))
    right, bottom = min(size, int(x.max()) + 1), min(size, int(y.max()) + 1)
    canvas = PIL.Image.new("L", ((right - left) * _SUPERSAMPLE, (bottom - top) * _SUPERSAMPLE))
    shifted = [((a - left) * _SUPERSAMPLE, (b - top) * _SUPERSAMPLE) for a, b in points]
    PIL.ImageDraw.Draw(canvas).polygon(shifted, 255)
    share = np.asarray(canvas.reduce(_SUPERSAMPLE), np.float32) / 255
    return slice(top, bottom), slice(left, right), share


def _segment_id(category: Category, number: int) -> int:
    red, green, blue = category.colour
    return red + number + 256 * green + 65536 * blue


def draw_scene(
    rng: Generator, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int32], tuple[SegmentInfo, ...]]:
    """One image: (size, size, 3) RGB uint8, (size, size) segment ids, and the segments.

    All that varies comes from `rng`. Segments of which next to nothing is visible are void.
    """
    regions = _regions(rng, size)
    kinds = rng.permutation(len(STUFF))[: int(regions.max()) + 1]
    names = {_segment_id(STUFF[kind], 0): STUFF[kind].id for kind in kinds}
    ids = np.array(list(names), np.int32)[regions]
    pixels = np.zeros((size, size, 3))
    used: list[Array] = []
    for region, kind in enumerate(kinds):
        inside = regions == region
        pixels[inside] = _TEXTURES[kind](rng, size)[inside]
        used.append(pixels[inside].mean(axis=0))
    placed: list[tuple[Array, float]] = []
    for number in range(int(rng.integers(1, _MAX_THINGS + 1))):
        category = THINGS[rng.integers(len(THINGS))]
        radius = float(rng.uniform(*_RADIUS)) * size
        placed.append((_centre(rng, size, radius, placed), radius))
        outline = place_outline(OUTLINES[category.name](), rng, *placed[-1])
        rows, columns, share = _cover(outline, size)
        used.append(_unlike(rng, used))
        y, x = (part / radius for part in np.mgrid[rows, columns] - placed[-1][0][::-1].reshape(2, 1, 1))
        colour = used[-1] * _surface(category.name, y, x)[..., None]
        pixels[rows, columns] += share[..., None] * (colour - pixels[rows, columns])
        names[_segment_id(category, number)] = category.id
        ids[rows, columns][share >= 0.5] = _segment_id(category, number)
    pixels += rng.normal(0, _NOISE, pixels.shape)
    found, areas = np.unique(ids, return_counts=True)
    ids[np.isin(ids, found[areas < max(2, _MIN_AREA * size * size)])] = 0
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8), ids, describe_segments(ids, names)


def write_scenes(
    out: Path,
    *,
    train: int = 1000,
    val: int = 100,
    size: int = 129,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Path:
    """Draw the splits train and val in COCO's panoptic layout (see `vitkit.data.coco`); returns `out`.

    `train` and `val` count images, `size` is their side in pixels; `progress` gets (images done, images
    in all). The folder appears whole or not at all. The same seed writes the same bytes. Raises BadRequest
    for a count below 1, a size below 32, a negative seed, or an `out` that holds anything already.
    """
    counts = dict(zip(_SPLITS, (train, val), strict=True))
    for split, count in counts.items():
        if count < 1:
            raise BadRequest(f"{split} is {count}; it must be at least 1 image")
    if size < MIN_SIZE:
        raise BadRequest(f"size is {size}; scenes need at least {MIN_SIZE} pixels")
    if seed < 0:
        raise BadRequest(f"seed is {seed}; it must not be negative")
    check_new_folder(out)
    done = 0

    def samples(split: str, count: int) -> Iterator[NewImage]:
        nonlocal done
        for index in range(count):
            rng = np.random.default_rng([seed, _SPLITS.index(split), index])
            pixels, ids, segments = draw_scene(rng, size)
            yield NewImage(index, f"{index:06d}.png", pixels, ids, segments)
            done += 1
            progress(done, train + val)

    return write_panoptic_set(
        out, CATEGORIES, {split: samples(split, count) for split, count in counts.items()}
    )
