"""What pictures of all tasks share: colours, the font, sheets of several pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from PIL import Image, ImageFont

from vitkit.data.coco import default_colour

Colour = tuple[int, int, int]

INK, PAPER = (255, 255, 255), (0, 0, 0)
_MUTED = (128, 128, 128)


def class_colour(index: int, thing: bool) -> Colour:
    """The RGB colour of a class, the same for the same index; that of stuff is muted."""
    colour = default_colour(index)
    return colour if thing else mix(colour, _MUTED, 0.5)


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """A colour with `share` (0..1) of another one in it."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(colour, other, strict=True))
    return red, green, blue


@lru_cache(maxsize=8)
def load_font(size: int) -> Any:
    """Pillow's font, `size` pixels high."""
    # Loading takes longer than writing with it.
    return ImageFont.load_default(size=size)


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 4, gap: int = 6) -> Image.Image:
    """Pictures of equal size on one sheet, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), INK)
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
