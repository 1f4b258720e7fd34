"""Panoptic quality (PQ = SQ x RQ) of COCO's evaluation, and the mean IoU of the class maps.

Kirillov et al., "Panoptic Segmentation" (https://arxiv.org/abs/1801.00868), with the rules of COCO's
challenge (https://cocodataset.org/#panoptic-eval). In every image:

- A predicted and a true segment of one category match if their IoU exceeds 0.5. Predicted pixels whose
  truth is void (id 0) do not count in the union. Crowds never match.
- A true segment without a match is a false negative, unless it is a crowd.
- A predicted segment without a match is a false positive, unless more than half of it is on void or on a
  crowd of its category. If an image has several crowds of one category, the last in the JSON counts, as
  in COCO's code.

Over all images, SQ of a category is the mean IoU of its matches, RQ = TP / (TP + FP / 2 + FN / 2). The
averages are over the categories that have any TP, FP or FN.

mIoU: every pixel has the category of its segment (crowds are as good as any), in the truth and in the
prediction. Pixels whose truth is void are left out; a labelled pixel that is void in the prediction is a
miss of its category. IoU = both / either, summed over all images; the mean is over the categories that occur
in one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.data.coco import Category, PanopticSet, SegmentInfo
from vitkit.data.coco.ids import MAX_ID, check_ids, read_ids
from vitkit.data.coco.read import read_predictions
from vitkit.evaluate.results import Table
from vitkit.runtimes.errors import BadInput, BadRequest

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Quality:
    """PQ, SQ and RQ in per cent, means over the `categories` that occur; 0 if none does."""

    pq: float
    sq: float
    rq: float
    categories: int


@dataclass(frozen=True)
class ClassQuality:
    """One category: PQ, SQ, RQ and IoU in per cent, and how many segments were found, made up, missed."""

    pq: float
    sq: float
    rq: float
    tp: int
    fp: int
    fn: int
    iou: float


@dataclass(frozen=True)
class QualityReport:
    """Quality over all categories, over things, over stuff; mIoU in per cent; the classes that occur.

    See `vitkit.evaluate.results.Result`.
    """

    images: int
    all: Quality
    things: Quality
    stuff: Quality
    miou: float
    classes: dict[str, ClassQuality]
    data: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    metric = "PQ"

    @property
    def value(self) -> float:
        """PQ over all categories, in per cent."""
        return self.all.pq

    def summary(self) -> dict[str, Any]:
        """The figures as plain dictionaries and numbers, for JSON."""
        body = asdict(self)
        return {key: body[key] for key in ("images", "all", "things", "stuff", "miou", "classes")}

    def shown(self, title: str) -> list[str | Table]:
        """A table and a line for the terminal; `title` names the network or the predictions."""
        title += " (fast)" if self.settings.get("fast") else ""
        rows = []
        for name, part in {"all": self.all, "things": self.things, "stuff": self.stuff}.items():
            # Of equal width, so that the points stand below each other.
            figures = (f"{value:6.2f}" for value in (part.pq, part.sq, part.rq))
            rows.append((name, *figures, part.categories))
        columns = ("", "PQ", "SQ", "RQ", "categories")
        return [Table(columns, rows, f"{title}: {self.images} images"), f"mIoU {self.miou:.2f} %"]


class PanopticQuality:
    """Adds up panoptic quality image by image."""

    def __init__(self, categories: Sequence[Category]) -> None:
        """Raises BadRequest if two categories share an id or a name."""
        self.categories = tuple(categories)
        self._number = {category.id: i for i, category in enumerate(self.categories)}
        if len(self._number) < len(categories) or len({c.name for c in categories}) < len(categories):
            raise BadRequest("two of the categories share their id or their name")
        count = len(self.categories)
        self._images = 0
        self._tp, self._fp, self._fn = np.zeros((3, count), np.int64)
        self._iou = np.zeros(count)
        # Labelled pixels: of the truth, of the prediction, of both at once.
        self._true, self._predicted, self._both = np.zeros((3, count), np.int64)

    def add(
        self,
        truth_ids: NDArray[np.integer[Any]],
        truth: Sequence[SegmentInfo],
        ids: NDArray[np.integer[Any]],
        segments: Sequence[SegmentInfo],
        name: str = "",
    ) -> None:
        """Count one image: (H, W) ids and segments of the truth, then of the prediction.

        Areas are taken from the ids, not from the segments. Raises BadInput, naming the image by `name`,
        if the sizes differ, a map holds an id without a segment or the reverse, two segments share an
        id, or a category is unknown.
        """
        true_index, true_class = self._index(truth_ids, truth, f"{name}: the truth".removeprefix(": "))
        index, klass = self._index(ids, segments, f"{name}: the prediction".removeprefix(": "))
        if truth_ids.shape != ids.shape:
            raise BadInput(f"{name}: the truth is {truth_ids.shape}, the prediction {ids.shape}")
        wide = len(segments) + 1
        pairs = np.bincount(true_index.ravel() * wide + index.ravel(), minlength=(len(truth) + 1) * wide)
        # Row 0 and column 0 are void.
        joint = pairs.reshape(-1, wide)
        crowd = np.array([segment.crowd for segment in truth], np.bool_)
        self._count_pixels(joint, true_class, klass)
        self._count_segments(joint, true_class, klass, crowd)
        self._images += 1

    def _index(
        self, ids: NDArray[np.integer[Any]], segments: Sequence[SegmentInfo], what: str
    ) -> tuple[Counts, Counts]:
        """Ids -> positions in `segments` plus one, 0 for void; and the category number of every segment."""
        check_ids(ids, what)
        numbers = np.array([segment.id for segment in segments], np.int64)
        if len(set(numbers.tolist())) < len(numbers) or np.any((numbers < 1) | (numbers > MAX_ID)):
            raise BadInput(f"{what} lists a segment id twice, or one that is not within 1 to {MAX_ID}")
        if unknown := {s.category_id for s in segments} - self._number.keys():
            raise BadInput(f"{what} has segments of unknown categories: {sorted(unknown)[:5]}")
        # Untouched pages of such a table cost nothing; sorting every pixel would.
        table = np.zeros(max(int(ids.max()), int(numbers.max(initial=0))) + 1, np.int64)
        table[numbers] = np.arange(2, len(numbers) + 2)
        table[0] = 1
        index = table[ids]
        present = np.bincount(index.ravel(), minlength=len(numbers) + 2)
        if present[0]:
            strangers = np.unique(ids[index == 0])[:5].tolist()
            raise BadInput(f"{what} has pixels of the ids {strangers}, which segments_info does not list")
        if absent := numbers[present[2:] == 0].tolist():
            raise BadInput(f"{what} lists the segments {absent[:5]}, which have no pixel")
        return index - 1, np.array([self._number[s.category_id] for s in segments], np.int64)

    def _count_pixels(self, joint: Counts, true_class: Counts, klass: Counts) -> None:
        same = true_class[:, None] == klass
        np.add.at(self._true, true_class, joint[1:].sum(axis=1))
        np.add.at(self._predicted, klass, joint[1:, 1:].sum(axis=0))
        np.add.at(self._both, true_class, (joint[1:, 1:] * same).sum(axis=1))

    def _count_segments(
        self, joint: Counts, true_class: Counts, klass: Counts, crowd: NDArray[np.bool_]
    ) -> None:
        inside, void = joint[1:, 1:], joint[0, 1:]
        area = joint[:, 1:].sum(axis=0)
        union = joint[1:].sum(axis=1)[:, None] + (area - void) - inside
        iou = inside / union
        match = (true_class[:, None] == klass) & ~crowd[:, None] & (iou > 0.5)
        rows, columns = np.nonzero(match)
        np.add.at(self._tp, klass[columns], 1)
        np.add.at(self._iou, klass[columns], iou[rows, columns])
        np.add.at(self._fn, true_class[~match.any(axis=1) & ~crowd], 1)
        # Category -> the last of its crowds.
        crowds = {int(true_class[row]): int(row) for row in np.nonzero(crowd)[0]}
        excused = void.copy()
        for column, category in enumerate(klass.tolist()):
            if category in crowds:
                excused[column] += inside[crowds[category], column]
        np.add.at(self._fp, klass[~match.any(axis=0) & (excused / area <= 0.5)], 1)

    def merge(self, add: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> None:
        """Take the sum of several processes' counts for this process's; `add` adds an array up over them."""
        counts = [self._tp, self._fp, self._fn, self._true, self._predicted, self._both]
        # Integers of that size are exact in float64.
        summed = add(np.stack([*counts, self._iou, np.full_like(self._iou, self._images)]))
        for count, total in zip(counts, summed, strict=False):
            count[:] = total.round()
        self._iou, self._images = summed[-2], round(float(summed[-1, 0]))

    def report(self) -> QualityReport:
        """The quality over all images added so far."""
        number = self._tp + self._fp / 2 + self._fn / 2
        occurs = number > 0
        sq = 100 * self._iou / np.maximum(self._tp, 1)
        rq = 100 * self._tp / np.where(occurs, number, 1)
        pq = sq * rq / 100
        either = self._true + self._predicted - self._both
        iou = 100 * self._both / np.maximum(either, 1)
        thing = np.array([category.thing for category in self.categories], np.bool_)

        def mean(among: NDArray[np.bool_]) -> Quality:
            means = [float(part[among].mean()) if among.any() else 0.0 for part in (pq, sq, rq)]
            return Quality(means[0], means[1], means[2], int(among.sum()))

        classes = {
            self.categories[i].name: ClassQuality(
                pq=float(pq[i]),
                sq=float(sq[i]),
                rq=float(rq[i]),
                tp=int(self._tp[i]),
                fp=int(self._fp[i]),
                fn=int(self._fn[i]),
                iou=float(iou[i]),
            )
            for i in np.nonzero(occurs)[0]
        }
        miou = float(iou[either > 0].mean()) if either.any() else 0.0
        return QualityReport(
            self._images, mean(occurs), mean(occurs & thing), mean(occurs & ~thing), miou, classes
        )


def evaluate_predictions(
    truth: PanopticSet, json: Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> QualityReport:
    """Panoptic quality of predictions in COCO's format; `progress` gets (images done, images in all).

    Raises BadInput, naming the image or file, for an image without a prediction, a file that cannot be
    read, or segments that do not fit the PNG. Predictions for other images are not looked at.
    """
    predictions = read_predictions(json)
    missing = [image for image in truth.images if image.image_id not in predictions]
    if missing:
        raise BadInput(
            f"{json} has no prediction for {len(missing)} of the {len(truth.images)} images, "
            f"{missing[0].file.name} (id {missing[0].image_id!r}) first"
        )
    quality = PanopticQuality(truth.categories)
    for done, image in enumerate(truth.images, 1):
        png, segments = predictions[image.image_id]
        quality.add(read_ids(image.mask), image.segments, read_ids(png), segments, image.file.name)
        progress(done, len(truth.images))
    return quality.report()
