"""Pictures of semantic results: classes in colour over the image, with a legend."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitkit.pictures import panoptic
from vitkit.pictures.drawing import class_colour
from vitkit.runtimes.panoptic import Panoptic, Segment
from vitkit.runtimes.semantic import VOID, Semantic

# Arguments of `draw` for the frames of a video, whose pictures must all have one size.
VIDEO_OPTIONS = panoptic.VIDEO_OPTIONS
# A line has room for so many classes.
_SHOWN = 5


def describe(result: Semantic) -> str:
    """The classes with their shares of the image on one line: `sky 41%, road 30%, car 2%`."""
    shares = result.shares()
    found = [f"{result.labels[i]} {share:.0%}" for i, share in list(shares.items())[:_SHOWN]]
    more = f" and {len(shares) - _SHOWN} more" if len(shares) > _SHOWN else ""
    return ", ".join(found) + more


def to_json(result: Semantic) -> dict[str, Any]:
    """The classes that occur with their shares (0..1) of the image."""
    return {
        "classes": [
            {"index": i, "label": result.labels[i], "share": share} for i, share in result.shares().items()
        ]
    }


def draw(
    image: NDArray[np.uint8],
    result: Semantic,
    *,
    alpha: float = 0.5,
    width: int = 1600,
    lines: int | None = None,
) -> Image.Image:
    """The image under the colours of its classes, with a legend below it.

    The options are those of `vitkit.pictures.panoptic.draw`. Raises BadInput if the result is not of the
    image's size.
    """
    colours = {i: class_colour(i, True) for i in range(len(result.labels))}
    return panoptic.draw(image, as_stuff(result), colours, alpha=alpha, width=width, lines=lines)


def as_stuff(result: Semantic) -> Panoptic:
    """The classes as segments of stuff, one for each class that occurs, largest first; scores are 1."""
    shares = result.shares()
    # The last place is that of VOID, which is -1.
    numbers = np.zeros(len(result.labels) - VOID, np.int32)
    numbers[list(shares)] = np.arange(1, len(shares) + 1)
    segments = tuple(
        Segment(number, i, result.labels[i], False, 1.0, round(share * result.classes.size))
        for number, (i, share) in enumerate(shares.items(), start=1)
    )
    return Panoptic(numbers[result.classes], segments)
