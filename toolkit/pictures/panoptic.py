"""Pictures of panoptic results: segments in colour over the image, with a legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitkit.pictures.drawing import INK, PAPER, Colour, class_colour, load_font, mix
from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.panoptic import Panoptic, Segment

Colours = Sequence[Colour] | Mapping[int, Colour]

# Smaller pictures are enlarged to this many pixels on their longer side, so that text has room.
_LEAST = 320
# Pixels looked at on the longer side when a place for a name is sought.
_COARSE = 320

# Arguments of `draw` for the frames of a video, whose pictures must all have one size.
VIDEO_OPTIONS: dict[str, Any] = {"lines": 3}


def describe(result: Panoptic) -> str:
    """Things with their numbers, then stuff, on one line: `3 person, 1 car, sky, road`."""
    things = Counter(s.label for s in result.segments if s.thing)
    stuff = dict.fromkeys(s.label for s in result.segments if not s.thing)
    return ", ".join([*(f"{n} {name}" for name, n in things.most_common()), *stuff]) or "nothing found"


def to_json(result: Panoptic) -> dict[str, Any]:
    """The segments as plain numbers and texts."""
    names = ("id", "label", "score", "area", "thing")
    return {"segments": [{name: getattr(s, name) for name in names} for s in result.segments]}


def draw(
    image: NDArray[np.uint8],
    result: Panoptic,
    colours: Colours | None = None,
    *,
    alpha: float = 0.5,
    width: int = 1600,
    scores: bool = True,
    legend: bool = True,
    lines: int | None = None,
) -> Image.Image:
    """The image under the colours of its segments, with a legend below it.

    Instances of a thing are shades of its class's colour with an edge around each; the large ones bear
    their name, with the score unless `scores` is off. `colours` are RGB by class index, `class_colour`
    if absent; `alpha` (0..1) is their strength. The longer side gets at most `width` pixels, and at
    least 320 if `width` allows it. The `legend` has exactly `lines` lines if given, as many as it
    needs otherwise. Raises BadInput if the result is not of the image's size.
    """
    if result.ids.shape != image.shape[:2]:
        raise BadInput(f"the result is of {result.ids.shape} pixels, the image of {image.shape[:2]}")
    picture, ids = _fit(image, width), result.ids
    if picture.size != (ids.shape[1], ids.shape[0]):
        ids = _sample(ids, (picture.height, picture.width))
    picture = _tint(picture, ids, _shades(result.segments, colours), alpha)
    picture = _outline(picture, ids, result.segments)
    _name_things(picture, ids, result.segments, scores)
    return _on_legend(picture, _entries(result.segments, colours), lines) if legend else picture


def side_by_side(
    image: NDArray[np.uint8],
    result: Panoptic,
    truth: Panoptic,
    colours: Colours | None = None,
    *,
    alpha: float = 0.5,
    width: int = 640,
) -> Image.Image:
    """The image, the prediction and the truth (see `truth_as_panoptic`) in one picture.

    Each is at most `width` pixels wide. Classes have one colour if both results number them alike.
    """
    panels = {
        "image": _fit(image, width),
        "prediction": draw(image, result, colours, alpha=alpha, width=width),
        "truth": draw(image, truth, colours, alpha=alpha, width=width, scores=False),
    }
    gap, font = 6, load_font(16)
    sizes = [panel.size for panel in panels.values()]
    size = (sum(wide for wide, _ in sizes) + 2 * gap, max(tall for _, tall in sizes) + 24)
    sheet = Image.new("RGB", size, INK)
    pen, left = ImageDraw.Draw(sheet), 0
    for title, panel in panels.items():
        pen.text((left + 4, 2), title, fill=PAPER, font=font)
        sheet.paste(panel, (left, 24))
        left += panel.width + gap
    return sheet


def _colour(segment: Segment, colours: Colours | None) -> Colour:
    try:
        given = None if colours is None else colours[segment.index]
    except (KeyError, IndexError):
        given = None
    return given or class_colour(segment.index, segment.thing)


def _fit(image: NDArray[np.uint8], width: int) -> Image.Image:
    """The image, its longer side at most `width`, and at least 320 if `width` allows it."""
    picture, longer = Image.fromarray(image), max(image.shape[:2])
    factor = min(max(longer, _LEAST), width) / longer
    if factor == 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _sample(ids: NDArray[np.int32], size: tuple[int, int]) -> NDArray[np.int32]:
    """(H, W) ids at (height, width) `size`: those under the centres of the pixels."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.intp)
        for new, old in zip(size, ids.shape, strict=True)
    )
    return np.asarray(ids[rows[:, None], columns])


def _shades(segments: Sequence[Segment], colours: Colours | None) -> NDArray[np.uint8]:
    """RGB by segment id; the instances of a class are lighter and darker than its colour, by turns."""
    shades = np.zeros((max((s.id for s in segments), default=0) + 1, 3), np.uint8)
    seen: Counter[int] = Counter()
    for segment in segments:
        colour, number = _colour(segment, colours), seen[segment.index]
        if segment.thing and number:
            # Steps of the golden ratio: neighbours in number are far apart in shade.
            shift = 0.8 * ((number * 0.6180339887) % 1 - 0.5)
            colour = mix(colour, INK if shift > 0 else PAPER, abs(shift))
        shades[segment.id] = colour
        seen[segment.index] += 1
    return shades


def _tint(
    picture: Image.Image, ids: NDArray[np.int32], shades: NDArray[np.uint8], alpha: float
) -> Image.Image:
    strength = np.full(len(shades), round(255 * alpha), np.uint8)
    strength[0] = 0
    return Image.composite(Image.fromarray(shades[ids]), picture, Image.fromarray(strength[ids]))


def _outline(picture: Image.Image, ids: NDArray[np.int32], segments: Sequence[Segment]) -> Image.Image:
    """Outline instances: a light line on one side, a dark one on the other."""
    instance_of = np.zeros(max((s.id for s in segments), default=0) + 1, np.int32)
    for segment in segments:
        instance_of[segment.id] = segment.id if segment.thing else 0
    instances = instance_of[ids]
    beside = instances[:, 1:] != instances[:, :-1]
    below = instances[1:] != instances[:-1]
    light, dark = np.zeros((2, *ids.shape), np.bool_)
    light[:, 1:], dark[:, :-1] = beside, beside
    light[1:] |= below
    dark[:-1] |= below
    pixels = np.array(picture)
    pixels[dark] = PAPER
    pixels[light] = INK
    return Image.fromarray(pixels)


def _name_things(
    picture: Image.Image, ids: NDArray[np.int32], segments: Sequence[Segment], scores: bool
) -> None:
    """Write name and score, or one of them, on every thing that has room for it."""
    pen, height = ImageDraw.Draw(picture), max(10, max(picture.size) // 50)
    font, step = load_font(height), -(-max(picture.size) // _COARSE)
    coarse = ids[step // 2 :: step, step // 2 :: step]
    counts = np.bincount(coarse.ravel(), minlength=max((s.id for s in segments), default=0) + 1)
    for segment in segments:
        if not segment.thing or counts[segment.id] * step**2 < 8 * height**2:
            continue
        rows, columns = np.nonzero(coarse == segment.id)
        row = rows[len(rows) // 2]
        across = columns[rows == row]
        share, name = f"{segment.score:.0%}", _one_line(segment.label)
        for text in (f"{name} {share}", share) if scores else (name,):
            if pen.textlength(text, font=font) < 0.9 * len(across) * step:
                place = (int(across[len(across) // 2]) * step + step // 2, int(row) * step + step // 2)
                pen.text(place, text, fill=INK, font=font, anchor="mm", stroke_width=1, stroke_fill=PAPER)
                break


def _one_line(label: str) -> str:
    # No picture has room for more.
    return " ".join(label.split())[:80]


class _Entry(NamedTuple):
    colour: Colour | None
    text: str


def _entries(segments: Sequence[Segment], colours: Colours | None) -> list[_Entry]:
    """The lines of the legend, things with their number first."""
    counts = Counter((not s.thing, s.index) for s in segments)
    first = {(not s.thing, s.index): s for s in reversed(segments)}
    found = []
    for key, count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        segment = first[key]
        name = _one_line(segment.label)
        found.append(_Entry(_colour(segment, colours), f"{name} {count}" if segment.thing else name))
    return found or [_Entry(None, "nothing found")]


def _on_legend(picture: Image.Image, entries: list[_Entry], lines: int | None) -> Image.Image:
    """The picture with a strip below it that lists the entries."""
    size = min(24, max(12, picture.width // 50))
    font, line = load_font(size), round(1.6 * size)
    width = max(picture.width, _LEAST // 2)
    rows = _rows(entries, font, width, size)
    if lines is not None and len(rows) > lines:
        hidden = sum(len(row) for row in rows[lines:]) + 1
        rows = rows[:lines]
        rows[-1][-1] = (rows[-1][-1][0], _Entry(None, f"+{hidden}"))
    sheet = Image.new("RGB", (width, picture.height + line * (lines or len(rows))), INK)
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = picture.height + number * line + (line - size) // 2
        for left, entry in row:
            if entry.colour is not None:
                pen.rectangle([left, top, left + size - 1, top + size - 1], fill=entry.colour, outline=PAPER)
                left += round(1.4 * size)
            pen.text((left, top + size // 2), entry.text, fill=PAPER, font=font, anchor="lm")
    return sheet


def _rows(entries: list[_Entry], font: Any, width: int, size: int) -> list[list[tuple[int, _Entry]]]:
    """Entries with their left ends, in as many rows as the width makes of them."""
    rows: list[list[tuple[int, _Entry]]] = [[]]
    left = margin = size // 2
    for entry in entries:
        while font.getlength(entry.text) > width - 3 * size and len(entry.text) > 2:
            entry = _Entry(entry.colour, entry.text[:-2] + "…")
        needed = round(1.4 * size + font.getlength(entry.text))
        if rows[-1] and left + needed > width:
            rows.append([])
            left = margin
        rows[-1].append((left, entry))
        left += needed + size
    return rows
