"""Accuracy of a run or an engine on a labelled folder: the task's own metric, on the engine itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.data.folder import labelled_images
from vitkit.data.panoptic import Category, PanopticImage, PanopticSet, Segment, read_ids
from vitkit.panoptic_quality import PanopticQuality, QualityReport
from vitkit.runtimes.card import ModelCard, read_card
from vitkit.runtimes.decode import decoder
from vitkit.runtimes.errors import BadArtifact, BadInput
from vitkit.runtimes.image import placement, prepare, read_image
from vitkit.runtimes.panoptic import Panoptic

BATCH = 16


class Network(NamedTuple):
    """A run or an artifact behind one call: prepared inputs (N, ...) -> outputs by name."""

    card: ModelCard
    predict: Callable[[NDArray[Any]], dict[str, NDArray[Any]]]
    close: Callable[[], None]


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in per cent, and the class given to every image, in the data set's order."""

    images: int
    top1: float
    top5: float
    predictions: tuple[int, ...]


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
        return Network(run.card, Source(run.model, run.card).predict, lambda: None)
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
        inputs = np.stack([prepare(photo, network.card.image) for photo in photos])
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
) -> QualityReport:
    """Segment every image of a panoptic set and compare with its truth, at each image's own size.

    `fast` decodes in the fast mode. `keep` hears every image with its result and the result's segments in
    the data set's categories. Raises BadInput for categories that the network lacks, and unreadable images.
    """
    if network.card.task != "panoptic":
        raise BadArtifact(f"{network.card.name} does {network.card.task}, not panoptic segmentation")
    categories = matching_categories(network.card, truth.categories)
    decode = decoder(network.card, {"fast": fast})
    quality = PanopticQuality(truth.categories)
    for done, image in enumerate(truth.images, start=1):
        photo = read_image(image.file)
        outputs = network.predict(prepare(photo, network.card.image)[None])
        place = placement(photo.shape[0], photo.shape[1], network.card.image)
        result: Panoptic = decode({name: value[0] for name, value in outputs.items()}, network.card, place)
        segments = tuple(
            Segment(s.id, categories[s.index].id, s.area, score=s.score) for s in result.segments
        )
        quality.add(read_ids(image.mask), image.segments, result.ids, segments, str(image.file))
        keep(image, result, segments)
        progress(done, len(truth.images))
    return quality.report()


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
