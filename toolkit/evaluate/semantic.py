"""Mean IoU of a semantic network on label maps, or on the truth of a data set in COCO's panoptic layout.

    DIR/images/**/NAME.jpg    the images, in any format that is read
    DIR/labels/**/NAME.png    the class index of every pixel, grey or with a palette; 255 is ignored

Ignored pixels count nowhere. IoU of a class = both / either, its pixels summed over all images; the mean is
over the classes that occur in the truth or in the prediction. A labelled pixel that the network did not see,
outside its crop, is a miss of its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.data.coco import PanopticImage
from vitkit.data.coco.ids import first_few, read_ids
from vitkit.data.coco.read import find_splits, read_split
from vitkit.evaluate.classes import matching_categories
from vitkit.evaluate.network import Network, results_of
from vitkit.evaluate.results import Table
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest, VitkitError
from vitkit.runtimes.image import MAX_FILE_BYTES
from vitkit.runtimes.listing import find_images
from vitkit.runtimes.pillow import pillow
from vitkit.runtimes.reading import open_file
from vitkit.runtimes.semantic import VOID, Semantic, logits_name
from vitkit.runtimes.tasks import decoder

# Options of `evaluate` beside the network and the data, for the command line.
OPTIONS = ("split",)
# The value of `vitkit evaluate` by which semantic networks are compared, and how people call it.
METRIC, UNIT = "miou", "mIoU"
# Pixels of the truth that count nowhere. With more classes than 8 bits have, 255 is one of them.
IGNORED, IGNORED_16 = 255, 65535
# Pillow spreads the values of grey PNGs with fewer bits over 0..255.
_SPREAD = {"L;2": 85, "L;4": 17}
_MODES = ("1", "L", "P", "I;16", "I")

Labels = NDArray[np.int32]


@dataclass(frozen=True)
class ClassOverlap:
    """One class: IoU and the share of its pixels that were found in per cent, and its pixels in the truth."""

    iou: float
    found: float
    pixels: int


@dataclass(frozen=True)
class SemanticReport:
    """Mean IoU and the share of right pixels in per cent, and every class that occurs.

    See `vitkit.evaluate.results.Result`.
    """

    data: str
    images: int
    miou: float
    pixel_accuracy: float
    classes: dict[str, ClassOverlap]

    metric = UNIT
    settings: ClassVar[dict[str, Any]] = {}

    @property
    def value(self) -> float:
        """Mean IoU in per cent."""
        return self.miou

    def summary(self) -> dict[str, Any]:
        """The figures as plain dictionaries and numbers, for JSON."""
        body = asdict(self)
        return {key: body[key] for key in ("images", "miou", "pixel_accuracy", "classes")}

    def shown(self, title: str) -> list[str | Table]:
        """A table of the classes and a line for the terminal; `title` names the network."""
        rows = [
            (name, f"{part.iou:6.2f}", f"{part.found:6.2f}", f"{part.pixels:,}")
            for name, part in self.classes.items()
        ]
        table = Table(("class", "IoU", "found", "pixels"), rows, f"{title}: {self.images} images")
        return [table, f"mIoU {self.miou:.2f} %, right pixels {self.pixel_accuracy:.2f} %"]


class Overlap:
    """Adds up the pixels of every pair of classes, image by image."""

    def __init__(self, classes: int) -> None:
        # Rows are classes of the truth, columns those of the prediction, the last one of them VOID.
        self._pairs = np.zeros((classes, classes + 1), np.int64)

    def add(self, truth: Labels, found: Labels) -> None:
        """Count one image: (H, W) classes of the truth, `VOID` if ignored, and of the prediction."""
        counted = truth != VOID
        rows, columns = self._pairs.shape
        # -1, which is VOID, becomes the last column.
        pairs = truth[counted].astype(np.int64) * columns + found[counted] % columns
        self._pairs += np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)

    def report(self, data: str, images: int, names: Sequence[str]) -> SemanticReport:
        """The figures over all images added so far; `names` are those of the classes.

        Raises BadInput if no pixel counts.
        """
        both = self._pairs.diagonal()
        true, predicted = self._pairs.sum(axis=1), self._pairs[:, :-1].sum(axis=0)
        either = true + predicted - both
        iou, found = 100 * both / np.maximum(either, 1), 100 * both / np.maximum(true, 1)
        occurs = np.flatnonzero(either)
        if not len(occurs):
            raise BadInput(f"every pixel of the truth in {data} is ignored")
        classes = {
            names[i]: ClassOverlap(float(iou[i]), float(found[i]), int(true[i])) for i in occurs.tolist()
        }
        accuracy = 100 * float(both.sum()) / max(int(true.sum()), 1)
        return SemanticReport(data, images, float(iou[occurs].mean()), accuracy, classes)


class _Truth(NamedTuple):
    """Where the truth is, the images, a function that reads the classes of one, and the names of classes.

    Beyond the network's own classes there may be others of the truth, which it never predicts.
    """

    data: str
    files: Sequence[Path]
    read: Callable[[int], Labels]
    names: Sequence[str]


def evaluate(
    network: Network,
    data: Path,
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    split: str | None = None,
) -> SemanticReport:
    """Segment every image and compare with its truth, at each image's own size.

    `data` has label maps (see the module), or COCO's panoptic layout, of which `split` is read; `progress`
    gets (images done, images in all). Raises BadInput for an image or a label map without the other, of
    another size or unreadable, and a class that the network lacks; BadRequest for `split` of label maps;
    BadArtifact for a network of another task; RunFailed for outputs that are not finite.
    """
    card = network.card
    if card.task != "semantic":
        raise BadArtifact(f"{card.name} does {card.task}; mIoU is for semantic segmentation")
    decode = decoder(card)
    truth = _open_truth(card, data, split)
    overlap = Overlap(len(truth.names))
    found: Iterator[Semantic] = results_of(network, truth.files, decode)
    for number, (file, result) in enumerate(zip(truth.files, found, strict=True)):
        classes = truth.read(number)
        if classes.shape != result.classes.shape:
            raise BadInput(f"{file} has {result.classes.shape} pixels, its truth {classes.shape}")
        overlap.add(classes, result.classes)
        progress(number + 1, len(truth.files))
    return overlap.report(truth.data, len(truth.files), truth.names)


def _open_truth(card: ModelCard, data: Path, split: str | None) -> _Truth:
    output = card.output(logits_name(card))
    assert output is not None, "the card was checked"
    labels = card.labels or tuple(map(str, range(output.shape[1] or 0)))
    if not (data / "labels").is_dir():
        try:
            find_splits(data)
        except BadInput as error:
            raise BadInput(f"{error}; or DIR/images/NAME.jpg with DIR/labels/NAME.png") from None
        return _panoptic_truth(card, data, split)
    if split is not None:
        raise BadRequest(f"--split is for COCO's panoptic layout; {data} has label maps")
    pairs = paired_files(data)

    def read(number: int) -> Labels:
        return read_label_map(pairs[number][1], len(labels))

    # Two classes may have one name.
    names = [name if labels.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(labels)]
    return _Truth(str(data), [image for image, _ in pairs], read, names)


def _panoptic_truth(card: ModelCard, data: Path, split: str | None) -> _Truth:
    """Every pixel's category in a panoptic set; void is ignored."""
    truth = read_split(data, split)
    own = matching_categories(card, truth.categories)
    ordered = [*own, *(category for category in truth.categories if category not in own)]
    classes = {category.id: i for i, category in enumerate(ordered)}

    def read(number: int) -> Labels:
        return classes_of(truth.images[number], classes)

    files = [image.file for image in truth.images]
    return _Truth(str(truth.source), files, read, [category.name for category in ordered])


def classes_of(image: PanopticImage, classes: Mapping[int, int]) -> Labels:
    """Every pixel's class in the truth of a panoptic image, `VOID` without one; `classes` by category id.

    Raises BadInput for a map that cannot be read, or that holds an id without a segment.
    """
    ids = read_ids(image.mask)
    table = {segment.id: classes[segment.category_id] for segment in image.segments}
    found, places = np.unique(ids, return_inverse=True)
    if unknown := sorted(set(found.tolist()) - table.keys() - {0}):
        raise BadInput(f"{image.mask} has pixels of the ids {unknown[:5]}, which segments_info does not list")
    return np.array([table.get(i, VOID) for i in found.tolist()], np.int32)[places].reshape(ids.shape)


def paired_files(data: Path) -> list[tuple[Path, Path]]:
    """The images below DIR/images, each with its label map at the same place below DIR/labels.

    Raises BadInput for a folder without images, and for an image or a label map without the other.
    """
    images, labels = (_files_by_name(data / name) for name in ("images", "labels"))
    if not images:
        raise BadInput(
            f"{data / 'images'} holds no images; wanted are DIR/images/NAME.jpg, DIR/labels/NAME.png"
        )
    for one, other, what in ((images, labels, "label map"), (labels, images, "image")):
        if lacking := sorted(one.keys() - other.keys()):
            raise BadInput(f"there is no {what} for {len(lacking)} of {len(one)} files: {first_few(lacking)}")
    return [(images[name], labels[name]) for name in sorted(images)]


def _files_by_name(folder: Path) -> dict[Path, Path]:
    found: dict[Path, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("")
        if name in found:
            raise BadInput(f"{found[name]} and {path} have one name; remove one of them")
        found[name] = path
    return found


def read_label_map(path: Path, classes: int) -> Labels:
    """The class of every pixel of a grey or palette PNG, (H, W); `VOID` if it is ignored.

    255 is ignored, or is a class if there are over 255 of them; 65535 always is. Raises BadInput for a file
    that cannot be read or has colours, and for an index that is no class.
    """
    try:
        with open_file(path, MAX_FILE_BYTES) as file, pillow().Image.open(file) as image:
            if image.mode not in _MODES:
                raise BadInput(
                    f"{path} is no label map: its mode is {image.mode}; it must hold a class index for every "
                    "pixel, as a grey PNG or one with a palette"
                )
            spread = _SPREAD.get(str(image.tile[0][3]), 1) if image.tile else 1
            found = np.asarray(image).astype(np.int32) // spread
    except VitkitError:
        raise
    # Pillow's decoders raise many types on hostile bytes (SyntaxError, struct.error, ValueError, ...).
    except Exception as error:
        raise BadInput(f"{path} cannot be read as an image: {error}") from None
    ignored = (found == IGNORED_16) | ((found == IGNORED) if classes <= IGNORED else False)
    found[ignored] = VOID
    if found.max() >= classes:
        raise BadInput(
            f"{path} has the class {found.max()}; the network has {classes}, counted from 0, and "
            f"{IGNORED if classes <= IGNORED else IGNORED_16} is ignored"
        )
    return found
