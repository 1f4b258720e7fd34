"""Accuracy of a run or an engine on a labelled folder: the task's own metric, on the engine itself."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.data.coco.read import (
    NO_BOX,
    Box,
    Category,
    PanopticImage,
    PanopticSet,
    Segment,
    measure_segments,
    read_ids,
    write_predictions,
)
from vitkit.data.folder import labelled_images
from vitkit.evaluate.panoptic_quality import PanopticQuality, QualityReport
from vitkit.runtimes.card import Artifact, ModelCard, read_card
from vitkit.runtimes.errors import BadArtifact, BadInput
from vitkit.runtimes.image import placement, prepare_batch, read_image
from vitkit.runtimes.panoptic import Panoptic
from vitkit.runtimes.panoptic import Segment as Found
from vitkit.runtimes.tasks import decoder

FORMAT = 1
BATCH = 16


class Network(NamedTuple):
    """A run or an artifact behind one call: prepared inputs (N, ...) -> outputs by name.

    `stages` are a run's decisions inside the network, as `Source.stages`; an engine does not tell them.
    """

    card: ModelCard
    predict: Callable[[NDArray[Any]], dict[str, NDArray[Any]]]
    close: Callable[[], None]
    stages: Callable[[NDArray[Any]], dict[str, NDArray[Any]]] = lambda inputs: {}


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in per cent, and the class given to every image, in the data set's order."""

    images: int
    top1: float
    top5: float
    predictions: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """The measured numbers, for JSON."""
        return {"images": self.images, "top1": self.top1, "top5": self.top5}


def to_json(
    path: Path, card: ModelCard, data: str, found: Accuracy | QualityReport, **options: Any
) -> dict[str, Any]:
    """What was measured on which network, told by the hashes of its files, and on which data.

    `size_bytes` is that of an engine, None for a run. `options` are the settings that change the figures.
    """
    artifact = Artifact(path, card)
    return {
        "format": FORMAT,
        "network": str(path),
        "artifact": path.resolve().name,
        "name": card.name,
        "target": card.target,
        "precision": card.precision,
        "files": artifact.hashes(),
        "size_bytes": artifact.size_bytes if card.engine else None,
        "data": data,
        **options,
        **found.summary(),
    }


def open_network(path: Path, threads: int | None = None) -> Network:
    """Open a run folder (in torch) or an artifact (in its engine). Raises BadArtifact."""
    from vitkit.runtimes.engine import check_threads, open_engine

    if read_card(path).target == "torch":
        from vitkit.exporters.source import Source
        from vitkit.runs import load_run

        check_threads(threads)
        run = load_run(path)
        if threads:
            import torch

            torch.set_num_threads(threads)
        source = Source(run.model, run.card)
        return Network(run.card, source.predict, lambda: None, source.stages)
    engine = open_engine(path, threads=threads)
    return Network(engine.card, engine.run_batched, engine.close)


def class_indices(card: ModelCard, names: list[str]) -> list[int]:
    """Folder names -> class indices, by the card's label ids, its labels, or as plain numbers.

    Raises BadInput naming the folders that are none of these.
    """
    known = {str(i): i for i in range(len(card.labels))}
    known |= {name: i for i, name in enumerate(card.labels)}
    known |= {name: i for i, name in enumerate(card.label_ids or ())}
    if unknown := sorted(set(names) - set(known)):
        some = ", ".join((card.label_ids or card.labels)[:3])
        raise BadInput(
            f"{len(unknown)} folders are no class of {card.name}: {', '.join(unknown[:5])}; "
            f"its {len(card.labels)} classes are {some}, ..."
        )
    return [known[name] for name in names]


def evaluate(
    network: Network, data: Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> Accuracy:
    """Classify every image of `DIR/CLASS/...`; `progress` hears (images done, images in all).

    Raises BadInput for an unusable folder, an unknown class or an unreadable image, naming it.
    """
    if network.card.task != "classification":
        raise BadArtifact(f"{network.card.name} does {network.card.task}, which cannot be evaluated here")
    items = labelled_images(data)
    truth = np.array(class_indices(network.card, [name for _, name in items]))
    logits = network.card.decode.get("logits", network.card.outputs[0].name)
    ranks, predictions = [], []
    for start in range(0, len(items), BATCH):
        photos = [read_image(path) for path, _ in items[start : start + BATCH]]
        inputs = prepare_batch(photos, network.card.image)
        scores = network.predict(inputs)[logits]
        wanted = truth[start : start + len(photos)]
        order = np.argsort(-scores, axis=1, kind="stable")
        ranks.append((order == wanted[:, None]).argmax(axis=1))
        predictions += order[:, 0].tolist()
        progress(start + len(photos), len(items))
    rank = np.concatenate(ranks)
    return Accuracy(
        len(items), 100 * float((rank < 1).mean()), 100 * float((rank < 5).mean()), tuple(predictions)
    )


def evaluate_panoptic(
    network: Network,
    truth: PanopticSet,
    *,
    fast: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
    keep: Callable[[PanopticImage, Panoptic, tuple[Segment, ...]], object] = lambda *result: None,
    save: Path | None = None,
    merge: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda counts: counts,
) -> QualityReport:
    """Segment every image of a panoptic set and compare with its truth, at each image's own size.

    `fast` decodes in the fast mode. `keep` hears every image with its result and the result's segments in
    the data set's categories. `save` is a file for them in COCO's format (see `write_predictions`). Where
    several processes take a part of the images each, `merge` adds their counts up. Raises BadInput for
    categories that the network lacks, and unreadable images; BadRequest where `save` exists.
    """
    if network.card.task != "panoptic":
        raise BadArtifact(f"{network.card.name} does {network.card.task}, not panoptic segmentation")
    categories = matching_categories(network.card, truth.categories)
    decode = decoder(network.card, {"fast": fast})
    quality = PanopticQuality(truth.categories)

    def results() -> Iterator[tuple[int | str, NDArray[np.int32], tuple[Segment, ...]]]:
        for done, image in enumerate(truth.images, start=1):
            photo = read_image(image.file)
            outputs = network.predict(prepare_batch([photo], network.card.image))
            place = placement(photo.shape[0], photo.shape[1], network.card.image)
            result: Panoptic = decode(
                {name: value[0] for name, value in outputs.items()}, network.card, place
            )
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
    return quality.report()


def coco_segments(
    result: Panoptic, categories: Sequence[Category], boxes: bool = True
) -> tuple[Segment, ...]:
    """A result's segments in COCO's form; `categories` are those of the network's classes, in their order.

    Their boxes are measured, unless `boxes` is off.
    """
    found = _boxes(result) if boxes else [NO_BOX] * len(result.segments)
    return tuple(
        Segment(s.id, categories[s.index].id, s.area, box=box, score=s.score)
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

    Their ids are the card's label ids where these are different whole numbers, else 1, 2, ...
    """
    from vitkit.pictures.draw import class_colour

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
    segments: list[Found] = []
    for number, segment in enumerate(shown, start=1):
        index = classes[segment.category_id]
        name, thing = categories[index].name, categories[index].thing
        table[segment.id] = number
        segments.append(Found(number, index, name, thing, 1.0, areas[segment.id]))
    return Panoptic(table[old], tuple(segments))


def matching_categories(card: ModelCard, categories: Sequence[Category]) -> list[Category]:
    """The data set's category of each of the network's classes, found by name, else by id.

    Raises BadInput naming the classes that the data set lacks.
    """
    by_name = {category.name: category for category in categories}
    by_id = {str(category.id): category for category in categories}
    ids = card.label_ids or card.labels
    found = [by_name.get(name) or by_id.get(i) for name, i in zip(card.labels, ids, strict=True)]
    if missing := [name for name, category in zip(card.labels, found, strict=True) if category is None]:
        raise BadInput(
            f"the data set lacks {len(missing)} of the {len(found)} classes of {card.name}: "
            f"{', '.join(missing[:5])}; its categories are {', '.join(list(by_name)[:5])}, ..."
        )
    return [category for category in found if category is not None]
