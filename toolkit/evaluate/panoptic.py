"""Panoptic quality of a network on a data set in COCO's layout, and what joins the two."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitkit.data.coco import Box, Category, PanopticImage, PanopticSet, SegmentInfo
from vitkit.data.coco.ids import measure_segments, read_ids
from vitkit.data.coco.read import read_split
from vitkit.data.coco.write import check_predictions_path, write_predictions
from vitkit.evaluate.classes import matching_categories
from vitkit.evaluate.network import Network, results_of
from vitkit.evaluate.panoptic_quality import PanopticQuality, QualityReport
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.errors import BadArtifact, BadInput
from vitkit.runtimes.panoptic import Panoptic, Segment
from vitkit.runtimes.tasks import decoder

# Options of `evaluate` beside the network and the data, for the command line.
OPTIONS = ("split", "fast", "save")
# The value of `vitkit evaluate` by which panoptic networks are compared, and how people call it.
METRIC, UNIT = "pq", "PQ"


def evaluate(
    network: Network,
    data: Path | PanopticSet,
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    split: str | None = None,
    fast: bool = False,
    save: Path | None = None,
    keep: Callable[[PanopticImage, Panoptic, tuple[SegmentInfo, ...]], object] = lambda *result: None,
    merge: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda counts: counts,
) -> QualityReport:
    """Segment every image of a panoptic set and compare with its truth, at each image's own size.

    `data` is a set or its folder, of which `split` is read (see `read_split`); `progress` gets (images done,
    images in all). `fast` decodes in the fast mode. `save` is a file for the predictions in COCO's format
    (see `write_predictions`). `keep` gets every image with its result and the result's segments in the
    set's categories. If several processes evaluate a part of the images each, `merge` adds up their counts.
    Raises BadInput for classes that the set lacks, and unreadable images; BadRequest if `save` exists;
    BadArtifact for a network of another task; RunFailed for outputs that are not finite.
    """
    if network.card.task != "panoptic":
        raise BadArtifact(f"{network.card.name} does {network.card.task}, not panoptic segmentation")
    if save is not None:
        check_predictions_path(save)
    truth = read_split(data, split) if isinstance(data, Path) else data
    categories = matching_categories(network.card, truth.categories)
    decode = decoder(network.card, {"fast": fast})
    quality = PanopticQuality(truth.categories)

    def results() -> Iterator[tuple[int | str, NDArray[np.int32], tuple[SegmentInfo, ...]]]:
        found: Iterator[Panoptic] = results_of(network, [image.file for image in truth.images], decode)
        for done, (image, result) in enumerate(zip(truth.images, found, strict=True), start=1):
            segments = coco_segments(result, categories, boxes=save is not None)
            quality.add(read_ids(image.mask), image.segments, result.ids, segments, str(image.file))
            keep(image, result, segments)
            progress(done, len(truth.images))
            yield image.image_id, result.ids, segments

    if save is None:
        deque(results(), maxlen=0)
    else:
        write_predictions(save, results(), truth.categories)
    quality.merge(merge)
    return replace(quality.report(), data=str(truth.source), settings={"fast": fast})


def save_predictions(path: Path, card: ModelCard, results: Iterable[tuple[int | str, Panoptic]]) -> None:
    """Write (image id, result) in COCO's format, with the categories of the card; see `write_predictions`."""
    categories = card_categories(card)
    predictions = ((number, r.ids, coco_segments(r, categories)) for number, r in results)
    write_predictions(path, predictions, categories)


def coco_segments(
    result: Panoptic, categories: Sequence[Category], boxes: bool = True
) -> tuple[SegmentInfo, ...]:
    """A result's segments in COCO's form; `categories` are those of the network's classes, in their order.

    Their boxes are measured, unless `boxes` is off.
    """
    found: Sequence[Box | None] = _boxes(result) if boxes else [None] * len(result.segments)
    return tuple(
        SegmentInfo(s.id, categories[s.index].id, s.area, box=box, score=s.score)
        for s, box in zip(result.segments, found, strict=True)
    )


def _boxes(result: Panoptic) -> list[Box]:
    """Of every segment: x, y, width, height."""
    height, width = result.ids.shape
    rows = np.zeros((len(result.segments) + 1, height), np.bool_)
    columns = np.zeros((len(result.segments) + 1, width), np.bool_)
    rows[result.ids, np.arange(height)[:, None]] = True
    columns[result.ids, np.arange(width)] = True
    boxes = []
    for segment in result.segments:
        y, x = np.flatnonzero(rows[segment.id]), np.flatnonzero(columns[segment.id])
        boxes.append((int(x[0]), int(y[0]), int(x[-1] - x[0]) + 1, int(y[-1] - y[0]) + 1))
    return boxes


def card_categories(card: ModelCard) -> tuple[Category, ...]:
    """The categories of a panoptic network's classes, in their order.

    Their ids are the card's label ids if these are different integers, else 1, 2, ...
    """
    from vitkit.pictures.drawing import class_colour

    given = card.label_ids or ()
    plain = len(set(given)) == len(card.labels) and all(re.fullmatch("0|[1-9][0-9]{0,8}", i) for i in given)
    ids = map(int, given) if plain else range(1, len(card.labels) + 1)
    things = set(card.decode["things"])
    return tuple(
        Category(number, name, i in things, class_colour(i, i in things))
        for i, (number, name) in enumerate(zip(ids, card.labels, strict=True))
    )


def truth_as_panoptic(image: PanopticImage, categories: Sequence[Category]) -> Panoptic:
    """The truth of an image in the form of a network's result, for drawing; scores are 1.

    A class is numbered by the place of its category in `categories`: those of `matching_categories` have
    the network's numbers. Raises BadInput for a segment of another category.
    """
    classes = {category.id: i for i, category in enumerate(categories)}
    if unknown := {s.category_id for s in image.segments} - classes.keys():
        raise BadInput(f"{image.mask} has segments of unknown categories: {sorted(unknown)[:5]}")
    old = read_ids(image.mask)
    # Untouched pages of such a table cost nothing; sorting every pixel would.
    table = np.zeros(int(old.max()) + 1, np.int32)
    areas = {number: area for number, (area, _) in measure_segments(old).items()}
    shown = sorted((s for s in image.segments if s.id in areas), key=lambda s: (-areas[s.id], s.id))
    segments: list[Segment] = []
    for number, segment in enumerate(shown, start=1):
        index = classes[segment.category_id]
        name, thing = categories[index].name, categories[index].thing
        table[segment.id] = number
        segments.append(Segment(number, index, name, thing, 1.0, areas[segment.id]))
    return Panoptic(table[old], tuple(segments))
