"""A picture of a whole training: loss, learning rate, measure and speed of every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitkit.train.checkpoint import Row, best_row

# Okabe and Ito's colours, which colour-blind people tell apart; yellow is left out, too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
# Lines of so few epochs carry a mark at each; one epoch alone would have no line.
_MARKED = 40


def draw_curves(path: Path, log: Sequence[Row], metric: str, unit: str, title: str) -> None:
    """Write a PNG of 900 x 700 pixels, the same bytes for the same log.

    `metric` names the value of a row, in per cent, by which epochs are compared, `unit` is what people call
    it. Raises OSError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=100)
    figure.subplots_adjust(0.08, 0.08, 0.98, 0.89, wspace=0.22, hspace=0.58)
    figure.suptitle(title, fontweight="bold")
    loss, measure, rate, speed = figure.subplots(2, 2).flat
    names = list(log[0])
    # A row begins with the loss and its parts, and goes on with the learning rate.
    parts = names[names.index("loss") : names.index("lr")]
    _plot(loss, log, parts)
    loss.set_title("loss, mean of an epoch")
    if len(parts) > 1:
        # Parts differ by orders of magnitude; one that is 0 is left out.
        loss.set_yscale("log", nonpositive="mask")
        loss.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    _plot(measure, log, [metric])
    best = best_row(log, metric)
    measure.plot(best["epoch"], best[metric], "*", color=_COLOURS[1], markersize=14, clip_on=False)
    measure.set_title(f"{unit}, best {best[metric]:.1f} % in epoch {best['epoch']:.0f}")
    _plot(rate, log, ["lr"])
    rate.set_title("learning rate at the end of an epoch")
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    _plot(speed, log, ["images_per_second"])
    speed.set_title("images per second")
    speed.set_ylim(0, 1.1 * max(row["images_per_second"] for row in log))
    # Nothing of when, and by which version: the same log gives the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})


def _plot(axes: Any, log: Sequence[Row], names: Sequence[str]) -> None:
    epochs = [row["epoch"] for row in log]
    for i, name in enumerate(names):
        axes.plot(
            epochs,
            [row[name] for row in log],
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_DASHES[i % len(_DASHES)],
            marker="o" if len(log) <= _MARKED else None,
            markersize=4,
            label=name,
        )
    axes.set_xlabel("epoch")
    axes.set_xlim(0.5, len(log) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
