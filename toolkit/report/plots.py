"""Plots as SVG text to stand inside a page: no script, text stays text, colours are the page's variables."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vitkit.report.text import html, shown, significant
from vitkit.runtimes.errors import MissingBackend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 6
# Colours that stand for the page's own, so that light, dark and print each have theirs.
_INK, _MUTED, _LINE = "#fe00f0", "#fe00f1", "#fe00f2"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line"} | {
    f"#fe000{i}": f"series-{i}" for i in range(SERIES)
}
_MARKERS = "osD^vPX"
# All lengths are units of the picture, which a phone shows at about 0.9 and a desktop at 1.3 pixels each.
_WIDTH, _MARGIN, _FONT = 400, 16, 12
_STRIP, _ROW, _AXIS = 24, 54, 40
_PARETO = 300
_NAME = 26
# The width of a character, about.
_LETTER = 7.1
# Above this ratio of the largest to the smallest time the axis is logarithmic.
LOG_FROM = 3.0


class Strip(NamedTuple):
    """One row of raw times in the order they ran, and marks (such as p50) in the same unit."""

    label: str
    series: int
    times: Sequence[float]
    marks: dict[str, float]


class Point(NamedTuple):
    """One artifact at x (smaller is better) and y (larger is better), with y's interval if known."""

    label: str
    series: int
    x: float
    y: float
    low: float | None
    high: float | None


def is_log(values: Sequence[float]) -> bool:
    """True if positive values are shown on a logarithmic axis."""
    return max(values) > LOG_FROM * min(values)


def strips(rows: Sequence[Strip], title: str, unit: str) -> str:
    """Every time of every row as a dot, the order of the queries running downwards.

    Of dots within half a unit of the picture of each other, one is drawn.
    """
    height = _ROW * len(rows) + _AXIS
    figure = _figure(height)
    axes = figure.add_axes(
        (_MARGIN / _WIDTH, _AXIS / height, 1 - 2 * _MARGIN / _WIDTH, _ROW * len(rows) / height)
    )
    _scale([time for row in rows for time in row.times], axes, unit, pad=0.02)
    axes.set_ylim(_ROW * len(rows), 0)
    axes.set_yticks([])
    for i, row in enumerate(rows):
        _draw_strip(axes, row, top=_ROW * i)
    return _svg(figure, title)


def _draw_strip(axes: Axes, row: Strip, top: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    upper, lower = top + _ROW - _STRIP - 3, top + _ROW - 3
    text: dict[str, Any] = {
        "transform": axes.get_yaxis_transform(),
        "fontsize": _FONT,
        "va": "baseline",
        "parse_math": False,
    }
    # Flush with the picture's edge, as headings and captions are.
    axes.text(-_MARGIN / (_WIDTH - 2 * _MARGIN), upper - 5, shown(row.label, _NAME), color=_INK, **text)
    known = " · ".join(f"{name} {significant(value)}" for name, value in row.marks.items())
    axes.text(1, upper - 5, known, color=_MUTED, ha="right", **text)
    order = np.linspace(upper, lower, len(row.times)) if len(row.times) > 1 else [(upper + lower) / 2]
    dots = axes.transData.transform(np.column_stack([row.times, order]))
    cells = np.unique((2 * dots).round(), axis=0) / 2
    places = axes.transData.inverted().transform(cells).repeat(2, axis=0)
    # A line of no length with round ends is a dot, and takes a tenth of a marker's bytes.
    path = Path(places, [Path.MOVETO, Path.LINETO] * len(cells))
    # Else matplotlib drops lines of no length.
    path.should_simplify = False
    colour = f"#fe000{row.series % SERIES}"
    axes.add_patch(
        PathPatch(path, edgecolor=colour, linewidth=1.6, capstyle="round", fill=False, clip_on=False)
    )
    for i, value in enumerate(row.marks.values()):
        reach, width = (2, 2) if i == 0 else (0, 1)
        axes.plot([value] * 2, [upper - reach, lower + reach], color=_INK, linewidth=width, clip_on=False)


def pareto(points: Sequence[Point], title: str, x_unit: str, y_unit: str) -> str:
    """Points with labels and intervals; the steps join the points of a series that no other beats."""
    figure = _figure(_PARETO)
    left, top = 46, 24
    axes = figure.add_axes(
        (
            left / _WIDTH,
            _AXIS / _PARETO,
            1 - (left + _MARGIN) / _WIDTH,
            1 - (_AXIS + top) / _PARETO,
        )
    )
    _scale([point.x for point in points], axes, x_unit, pad=0.08)
    heights = [y for p in points for y in (p.y, p.low, p.high) if y is not None]
    space = 0.1 * (max(heights) - min(heights)) or 1.0
    axes.set_ylim(min(heights) - space, max(heights) + space)
    axes.locator_params(axis="y", nbins=5)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.text(
        -left / (_WIDTH - left - _MARGIN),
        1 + 10 / (_PARETO - _AXIS - top),
        shown(y_unit, 60),
        transform=axes.transAxes,
        color=_MUTED,
        fontsize=_FONT,
        parse_math=False,
    )
    for point in points:
        _draw_point(axes, point)
    for series in sorted({point.series for point in points}):
        best = front([point for point in points if point.series == series])
        xs, ys = [point.x for point in best], [point.y for point in best]
        axes.step(xs, ys, where="post", color=f"#fe000{series % SERIES}", linewidth=1, linestyle=(0, (4, 3)))
    _label(axes, points)
    return _svg(figure, title)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats, being no slower and no worse and not equal; by rising x."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y or (point.x, point.y) == (best[-1].x, best[-1].y):
            best.append(point)
    return best


def _draw_point(axes: Axes, point: Point) -> None:
    colour = f"#fe000{point.series % SERIES}"
    if point.low is not None and point.high is not None:
        axes.plot([point.x] * 2, [point.low, point.high], color=colour, linewidth=1.2, alpha=0.45)
    marker = _MARKERS[point.series % len(_MARKERS)]
    axes.plot(point.x, point.y, marker, color=colour, markersize=7, markeredgewidth=0)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """A label beside each point, moved up or down until it covers no other label or point."""
    box = axes.get_window_extent()
    places = {point: tuple(axes.transData.transform((point.x, point.y))) for point in points}
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places.values()]
    for point, (x, y) in places.items():
        text = shown(point.label, _NAME)
        width = _LETTER * len(text)
        right = x + 8 + width <= box.x1
        start = x + 8 if right else x - 8 - width
        steps = sorted(range(-20, 21), key=abs)
        tried = [(start, y + 7 * step - 5, start + width, y + 7 * step + 6) for step in steps]
        inside = [one for one in tried if one[1] > box.y0 and one[3] < box.y1] or tried[:1]
        place = next((one for one in inside if not any(_overlap(one, other) for other in taken)), inside[0])
        taken.append(place)
        moved = abs(place[1] + 5 - y) > 7
        axes.annotate(
            text,
            (point.x, point.y),
            xytext=(8 if right else -8, place[1] + 5 - y),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            color=_INK,
            fontsize=_FONT,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": _MUTED, "linewidth": 0.6} if moved else None,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingBackend("matplotlib", "report", error) from None
    # At 72 dots to the inch a unit of the picture is a dot.
    return Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)


def _scale(values: Sequence[float], axes: Axes, unit: str, pad: float) -> None:
    """Limits, ticks and title of the x axis for positive values."""
    low, high = min(values), max(values)
    if is_log(values):
        axes.set_xscale("log")
        stretch = (high / low) ** pad
        low, high = low / stretch, high * stretch
        axes.set_xticks(_log_ticks(low, high), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:.6g}")
    else:
        space = pad * (high - low) or 0.1 * high
        low, high = low - space, high + space
        axes.locator_params(axis="x", nbins=6)
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.set_xlim(low, high)
    kind = "logarithmic" if axes.get_xscale() == "log" else "linear, not from 0"
    axes.set_xlabel(f"{unit} ({kind})", color=_MUTED, fontsize=_FONT, parse_math=False)
    axes.tick_params(colors=_MUTED, labelsize=_FONT, length=3, width=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=_MUTED, linewidth=0.7)


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]


def _svg(figure: Figure, title: str) -> str:
    import matplotlib

    out = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitkit"}), warnings.catch_warnings():
        # The browser has letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Several pictures share a page: names of one must not be names of another.
    prefix = re.sub(r"\W+", "-", shown(title).lower())
    # Only inside tags: a label may look like a colour.
    svg = re.sub("<[^>]*>", lambda tag: _adapt(tag[0], prefix), svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html(title)}" ', 1)


def _adapt(tag: str, prefix: str) -> str:
    if tag.startswith("<svg "):
        return re.sub(r' (width|height)="[^"]*"', "", tag)
    # A dot in a third of the bytes.
    tag = re.sub(r"M (\S+) (\S+)\s+L \1 \2\s+", r"M\1 \2h0", tag)
    tag = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\1{prefix}-", tag)
    return re.sub("|".join(_VARIABLES), lambda colour: f"var(--{_VARIABLES[colour[0]]})", tag)
