"""Pictures of results, drawn on the photographs they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitkit.runtimes.decode import Classification

_FIRST, _LAST, _INK, _PAPER = (80, 200, 255), (255, 80, 40), (255, 255, 255), (0, 0, 0)


def draw_classification(photo: NDArray[np.uint8], result: Classification, *, width: int = 512) -> Image.Image:
    """The photograph, at least `width` pixels wide, with its top class.

    Where the model has sampling points, an arrow goes from each one's first position to its last, as in
    figure 5 of the PS-ViT paper.
    """
    factor = max(1.0, width / photo.shape[1])
    size = (round(photo.shape[1] * factor), round(photo.shape[0] * factor))
    picture = Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC)
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
    pen.line([start, end], fill=_INK, width=max(1, round(radius / 2)))
    for (x, y), colour, r in ((start, _FIRST, radius * 0.7), (end, _LAST, radius)):
        pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)


def _caption(pen: ImageDraw.ImageDraw, text: str, size: tuple[int, int]) -> None:
    font = ImageFont.load_default(size=max(12, size[0] // 24))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    margin = (bottom - top) // 2
    pen.rectangle([0, 0, right - left + 2 * margin, bottom + margin], fill=_PAPER)
    pen.text((margin, margin // 2), text, fill=_INK, font=font)


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 4, gap: int = 6) -> Image.Image:
    """Pictures of equal size on one sheet, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), _INK)
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
