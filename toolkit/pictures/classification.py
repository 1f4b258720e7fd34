"""Pictures of a classifier's results: the top class, and where the network looked."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitkit.pictures.drawing import INK, PAPER, load_font
from vitkit.runtimes.classification import Classification

_FIRST, _LAST = (80, 200, 255), (255, 80, 40)


# Classifiers take images alone, no frames of videos.
VIDEO_OPTIONS = None


def describe(result: Classification) -> str:
    """The three most probable classes on one line."""
    return ", ".join(f"{label.name} {label.probability:.1%}" for label in result.top[:3])


def to_json(result: Classification) -> dict[str, Any]:
    """The most probable classes as plain numbers and texts."""
    return {"top": [asdict(label) for label in result.top]}


def draw(image: NDArray[np.uint8], result: Classification, *, width: int = 512) -> Image.Image:
    """The image, at least `width` pixels wide, with its top class.

    Where the model has sampling points, an arrow goes from each one's first position to its last, as in
    figure 5 of the PS-ViT paper.
    """
    factor = max(1.0, width / image.shape[1])
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    if result.points is not None:
        for first, last in zip(result.points[0], result.points[-1], strict=True):
            start, end = ((float(x + 0.5) * factor, float(y + 0.5) * factor) for y, x in (first, last))
            _arrow(pen, start, end, radius=size[0] / 160)
    _caption(pen, f"{result.label}  {result.probability:.0%}", size)
    return picture


def _arrow(
    pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], radius: float
) -> None:
    pen.line([start, end], fill=INK, width=max(1, round(radius / 2)))
    for (x, y), colour, r in ((start, _FIRST, radius * 0.7), (end, _LAST, radius)):
        pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)


def _caption(pen: ImageDraw.ImageDraw, text: str, size: tuple[int, int]) -> None:
    font = load_font(max(12, size[0] // 24))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    margin = (bottom - top) // 2
    pen.rectangle([0, 0, right - left + 2 * margin, bottom + margin], fill=PAPER)
    pen.text((margin, margin // 2), text, fill=INK, font=font)
