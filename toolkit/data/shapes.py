"""A small classification set drawn by arithmetic: ten shapes on cluttered, textured backgrounds.

Position, size, rotation and colours are random and independent of the class, so that a model has to
look at outlines. Every image is drawn from its own random numbers (seed, split, index): asking for more
images leaves the earlier ones as they were.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.random import Generator
from numpy.typing import NDArray

from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.files import check_writable

Array = NDArray[np.float64]

MIN_SIZE = 16
# Drawn this many times larger, then averaged: smooth edges without an antialiasing rasteriser.
_SUPERSAMPLE = 3
_SPLITS = ("train", "val")
# The most of each kind of clutter in one image.
_LINES, _BLOBS, _FRAGMENTS = 6, 6, 4
# Radius of the shape, and of the largest clutter, as parts of the image side.
_RADIUS = (0.18, 0.36)
_CLUTTER_RADIUS = 0.08
# Shapes are brighter than backgrounds: a small network needs far longer to learn both polarities.
_DARK, _BRIGHT = (20.0, 130.0), (90.0, 255.0)
# Mean difference of a colour from the background's, and standard deviation of the noise, of 0..255.
_CONTRAST = 50.0
_NOISE = 12.0


def _arc(start: float, stop: float, radius: float = 1.0, centre: float = 0.0) -> Array:
    angles = np.linspace(start, stop, 33)
    return np.stack([centre + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _polygon(corners: int, inner: float | None = None) -> Array:
    count = corners if inner is None else 2 * corners
    angles = np.arange(count) * (2 * np.pi / count)
    radii = np.ones(count) if inner is None else np.where(np.arange(count) % 2, inner, 1.0)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _ring() -> Array:
    # One outline with a cut of no width: there and back around the hole.
    return np.concatenate([_arc(0, 2 * np.pi), _arc(2 * np.pi, 0, radius=0.58)])


def _crescent() -> Array:
    # The second circle's centre and radius make both arcs meet at +-60 degrees.
    half = np.pi / 3
    centre, radius = 0.5, np.sin(half)
    return np.concatenate([_arc(half, 2 * np.pi - half), _arc(-np.pi / 2, -3 * np.pi / 2, radius, centre)])


def _heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, y + 2.5], axis=1) / 16


def _cross() -> Array:
    a, b = 0.95, 0.31
    corners = [(a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b)]
    return np.array(corners + [(-x, -y) for x, y in corners])


def _arrow() -> Array:
    upper = [(1.0, 0.0), (0.1, 0.8), (0.1, 0.28), (-1.0, 0.28)]
    return np.array(upper + [(x, -y) for x, y in reversed(upper[1:])])


# By class, a function that gives its outline: (corners, 2) as (x, y), about 1 from the origin at most.
OUTLINES: dict[str, Callable[[], Array]] = {
    "arrow": _arrow,
    "circle": lambda: _arc(0, 2 * np.pi),
    "crescent": _crescent,
    "cross": _cross,
    "heart": _heart,
    "hexagon": lambda: _polygon(6),
    "ring": _ring,
    "square": lambda: _polygon(4),
    "star": lambda: _polygon(5, inner=0.42),
    "triangle": lambda: _polygon(3),
}

CLASSES: tuple[str, ...] = tuple(OUTLINES)


def place_outline(outline: Array, rng: Generator, centre: Array, radius: float) -> list[tuple[float, float]]:
    """An outline of `OUTLINES`, turned at random and scaled: its corners (x, y) in pixels around `centre`."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return [(float(x), float(y)) for x, y in outline @ turn.T * radius + centre]


def _contrasting(
    rng: Generator, base: Array, bounds: tuple[float, float] = (0.0, 255.0)
) -> tuple[int, int, int]:
    while True:
        colour = rng.uniform(*bounds, 3)
        if np.abs(colour - base).mean() > _CONTRAST:
            red, green, blue = colour.astype(int).tolist()
            return red, green, blue


def _background(rng: Generator, base: Array, side: int) -> PIL.Image.Image:
    cells = int(rng.integers(3, 9))
    patches = base + rng.uniform(-40, 40, (cells, cells, 3))
    image = PIL.Image.fromarray(np.clip(patches, 0, 255).astype(np.uint8))
    return image.resize((side, side), PIL.Image.Resampling.BICUBIC)


def _clutter(draw: PIL.ImageDraw.ImageDraw, rng: Generator, base: Array, side: int) -> None:
    for _ in range(rng.integers(1, _LINES + 1)):
        ends = rng.uniform(0, side, 4).tolist()
        draw.line(ends, _contrasting(rng, base), width=int(rng.integers(1, 1 + side // 30)))
    for _ in range(rng.integers(1, _BLOBS + 1)):
        x, y = rng.uniform(0, side, 2)
        across, down = rng.uniform(0.01, _CLUTTER_RADIUS, 2) * side
        draw.ellipse((x - across, y - down, x + across, y + down), _contrasting(rng, base))
    for _ in range(rng.integers(0, _FRAGMENTS + 1)):
        outline = OUTLINES[CLASSES[rng.integers(len(CLASSES))]]()
        # A run of consecutive corners: edges and corners of the classes without a whole shape.
        part = np.roll(outline, rng.integers(len(outline)), axis=0)[: max(3, len(outline) // 2)]
        points = place_outline(part, rng, rng.uniform(0, side, 2), _CLUTTER_RADIUS * side)
        draw.polygon(points, _contrasting(rng, base))


def draw_shape(label: int, rng: Generator, size: int) -> NDArray[np.uint8]:
    """One image of class `CLASSES[label]`: (size, size, 3) RGB uint8; all that varies comes from `rng`."""
    side = size * _SUPERSAMPLE
    base = rng.uniform(*_DARK, 3)
    canvas = _background(rng, base, side)
    draw = PIL.ImageDraw.Draw(canvas)
    _clutter(draw, rng, base, side)
    radius = rng.uniform(*_RADIUS) * side
    centre = rng.uniform(0.9 * radius, side - 0.9 * radius, 2)
    draw.polygon(
        place_outline(OUTLINES[CLASSES[label]](), rng, centre, radius), _contrasting(rng, base, _BRIGHT)
    )
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLE), np.float64) + rng.normal(0, _NOISE, (size, size, 3))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def write_shapes(
    out: Path,
    *,
    train: int = 4000,
    val: int = 1000,
    size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Path:
    """Draw the set into `out/train/CLASS/00000.png` and `out/val/CLASS/00000.png`; returns `out`.

    `train` and `val` count images over all classes, `size` is their side in pixels; `progress` gets
    (images done, images in all). The folder appears whole or not at all. The same seed writes the
    same bytes. Raises BadRequest for a count below one image of each class, a size below 16, a negative
    seed, or an `out` that holds anything already.
    """
    counts = dict(zip(_SPLITS, (train, val), strict=True))
    _check_request(out, counts, size, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        done = 0
        for split, count in counts.items():
            for index in range(count):
                _write_image(work / "new" / split, split, index, size, seed)
                done += 1
                progress(done, train + val)
        (work / "new").replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _check_request(out: Path, counts: dict[str, int], size: int, seed: int) -> None:
    for split, count in counts.items():
        if count < len(CLASSES):
            raise BadRequest(
                f"{split} is {count}; it must be at least {len(CLASSES)}, one image of each class"
            )
    if size < MIN_SIZE:
        raise BadRequest(f"size is {size}; shapes need at least {MIN_SIZE} pixels")
    if seed < 0:
        raise BadRequest(f"seed is {seed}; it must not be negative")
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise BadRequest(f"the output {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        raise BadRequest(
            f"the output folder {out} is not empty; name a new folder, or remove it: rm -r {out}"
        )


def _write_image(folder: Path, split: str, index: int, size: int, seed: int) -> None:
    number, label = divmod(index, len(CLASSES))
    path = folder / CLASSES[label] / f"{number:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = draw_shape(label, np.random.default_rng([seed, _SPLITS.index(split), index]), size)
    # Lightest compression: noise does not compress, and drawing should not wait for zlib.
    PIL.Image.fromarray(pixels).save(path, compress_level=1)
