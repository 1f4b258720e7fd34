"""Cityscapes and ADE20K, as they are downloaded, into COCO's panoptic layout (see `vitkit.data.coco`).

Images are linked, not encoded again.

Cityscapes: `gtFine/<split>/<city>/*_gtFine_instanceIds.png`, 16 bits, and `leftImg8bit/<split>/<city>/`.
A value of 1000 or more is label * 1000 + instance; a smaller one is a label, of stuff or of a group of things
that nobody told apart: a crowd. Labels outside the 19 classes of the evaluation are void. As in
cityscapesScripts (https://github.com/mcordts/cityscapesScripts), `helpers/labels.py` and
`preparation/createPanopticImgs.py`.

ADE20K: the scene parsing challenge with its 150 classes, ADEChallengeData2016, and beside it
`annotations_instance/` and `categoryMapping.txt` of the instance segmentation challenge
(https://github.com/CSAILVision/placeschallenge). `annotations/*.png` holds classes 1..150, 0 is void;
`annotations_instance/*.png` has a thing's class, 1..100, in red and the number of the instance in green.
Stuff comes from the first, then instances are laid over it; pixels of things without an instance are void.
The things are the classes that categoryMapping.txt names: 100, which leaves 50 kinds of stuff.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.data.coco import Category, default_colour
from vitkit.data.coco.ids import describe_segments
from vitkit.data.coco.write import NewImage, check_new_folder, write_panoptic_set
from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.listing import find_images
from vitkit.runtimes.reading import MAX_DATA_JSON_BYTES, read_text

Progress = Callable[[int, int], object]
# An image and its annotation.
Pair = tuple[Path, Path]

# The classes of the evaluation, with the label ids of Cityscapes.
CITYSCAPES: tuple[Category, ...] = (
    Category(7, "road", False, (128, 64, 128)),
    Category(8, "sidewalk", False, (244, 35, 232)),
    Category(11, "building", False, (70, 70, 70)),
    Category(12, "wall", False, (102, 102, 156)),
    Category(13, "fence", False, (190, 153, 153)),
    Category(17, "pole", False, (153, 153, 153)),
    Category(19, "traffic light", False, (250, 170, 30)),
    Category(20, "traffic sign", False, (220, 220, 0)),
    Category(21, "vegetation", False, (107, 142, 35)),
    Category(22, "terrain", False, (152, 251, 152)),
    Category(23, "sky", False, (70, 130, 180)),
    Category(24, "person", True, (220, 20, 60)),
    Category(25, "rider", True, (255, 0, 0)),
    Category(26, "car", True, (0, 0, 142)),
    Category(27, "truck", True, (0, 0, 70)),
    Category(28, "bus", True, (0, 60, 100)),
    Category(31, "train", True, (0, 80, 100)),
    Category(32, "motorcycle", True, (0, 0, 230)),
    Category(33, "bicycle", True, (119, 11, 32)),
)
_ADE20K_SPLITS = {"train": "training", "val": "validation"}


def convert_cityscapes(source: Path, out: Path, progress: Progress = lambda done, total: None) -> Path:
    """Convert the splits train and val of Cityscapes, those that are there; returns `out`.

    The test split has no truth and is left out. `progress` gets (images done, images in all). The folder
    appears whole or not at all. Raises BadInput naming what is missing, unreadable or of another form,
    BadRequest for an `out` that holds anything already.
    """
    check_new_folder(out)
    pairs = {split: _cityscapes_pairs(source, split) for split in ("train", "val")}
    _check_found(
        pairs,
        source,
        "gtFine/{train,val}/<city>/*_gtFine_instanceIds.png and the images in leftImg8bit/{train,val}/",
    )
    splits = _converted(pairs, _cityscapes_sample, progress)
    return write_panoptic_set(out, CITYSCAPES, splits)


def _cityscapes_pairs(source: Path, split: str) -> list[Pair]:
    ending = "_gtFine_instanceIds.png"
    pairs = []
    for truth in sorted((source / "gtFine" / split).glob(f"*/*{ending}")):
        name = f"{truth.name.removesuffix(ending)}_leftImg8bit.png"
        image = source / "leftImg8bit" / split / truth.parent.name / name
        if not image.is_file():
            raise BadInput(f"{image} is missing; it is the image of {truth}")
        pairs.append((image, truth))
    return pairs


def _cityscapes_sample(image: Path, truth: Path) -> NewImage:
    values = _read_pixels(truth, channels=1)
    classes = {category.id: category for category in CITYSCAPES}
    categories: dict[int, int] = {}
    crowds: set[int] = set()
    for value in np.unique(values).tolist():
        label = value if value < 1000 else value // 1000
        if label in classes:
            categories[value] = label
            if value < 1000 and classes[label].thing:
                crowds.add(value)
    ids = np.where(np.isin(values, list(categories)), values, 0)
    name = image.name.removesuffix("_leftImg8bit.png")
    return NewImage(name, image.name, image, ids, describe_segments(ids, categories, crowds))


def convert_ade20k(source: Path, out: Path, progress: Progress = lambda done, total: None) -> Path:
    """Convert the splits training and validation of ADE20K, those that are there, to train and val.

    `progress` gets (images done, images in all). The folder appears whole or not at all; returns `out`.
    Raises BadInput naming what is missing, unreadable or of another form, BadRequest for an `out` that
    holds anything already.
    """
    check_new_folder(out)
    things = _ade20k_things(source / "categoryMapping.txt")
    categories = _ade20k_categories(source / "objectInfo150.txt", set(things.values()))
    pairs = {split: _ade20k_pairs(source, folder) for split, folder in _ADE20K_SPLITS.items()}
    _check_found(
        pairs,
        source,
        "images/, annotations/ and annotations_instance/, each with training/ and validation/",
    )

    def convert(image: Path, truth: Path) -> NewImage:
        return _ade20k_sample(image, truth, things, categories)

    return write_panoptic_set(out, categories, _converted(pairs, convert, progress))


def _ade20k_pairs(source: Path, folder: str) -> list[Pair]:
    pairs = []
    images = source / "images" / folder
    for image in find_images(images) if images.is_dir() else []:
        truth = source / "annotations" / folder / f"{image.stem}.png"
        for path in (truth, _instances(truth)):
            if not path.is_file():
                raise BadInput(f"{path} is missing; it belongs to {image}")
        pairs.append((image, truth))
    return pairs


def _instances(truth: Path) -> Path:
    return truth.parents[2] / "annotations_instance" / truth.parent.name / truth.name


def _ade20k_sample(
    image: Path, truth: Path, things: Mapping[int, int], categories: Sequence[Category]
) -> NewImage:
    classes = _read_pixels(truth, channels=1)
    instances = _read_pixels(_instances(truth), channels=3)
    if instances.shape[:2] != classes.shape:
        raise BadInput(f"{_instances(truth)} has another size than {truth}")
    stuff = [category.id for category in categories if not category.thing]
    if classes.max() > len(categories):
        raise BadInput(f"{truth} holds the class {classes.max()}; there are {len(categories)}")
    ids = np.where(np.isin(classes, stuff), classes, 0)
    kind, number = instances[..., 0], instances[..., 1]
    # Beyond the classes of stuff, and one id for every class and number.
    ids = np.where((kind > 0) & (number > 0), 1000 + 256 * kind + number, ids)
    names = {category: category for category in stuff}
    for value in np.unique(ids[ids >= 1000]).tolist():
        thing = (value - 1000) // 256
        if thing not in things:
            raise BadInput(f"{_instances(truth)} holds the class {thing}, which categoryMapping.txt lacks")
        names[value] = things[thing]
    return NewImage(image.stem, image.name, image, ids, describe_segments(ids, names))


def _ade20k_things(path: Path) -> dict[int, int]:
    """Class of the instance challenge -> class of scene parsing, both from 1."""
    things = {}
    for line in _lines(path, "the instance segmentation challenge of ADE20K")[1:]:
        words = line.split()
        if len(words) < 2 or not all(word.isascii() and word.isdigit() for word in words[:2]):
            raise BadInput(f"{path}: {line!r} does not begin with two class numbers")
        things[int(words[0])] = int(words[1])
    return things


def _ade20k_categories(path: Path, things: set[int]) -> tuple[Category, ...]:
    """The classes by number; a name is the first of its synonyms."""
    lines = _lines(path, "ADEChallengeData2016")
    heads = [head.strip() for head in lines[0].split("\t")]
    if "Idx" not in heads or "Name" not in heads:
        raise BadInput(f"{path}: its first line must name the columns Idx and Name, separated by tabs")
    names: dict[int, str] = {}
    for line in lines[1:]:
        cells = [cell.strip() for cell in line.split("\t")]
        number = dict(zip(heads, cells, strict=False)).get("Idx", "")
        if len(cells) != len(heads) or not (number.isascii() and number.isdigit()):
            raise BadInput(f"{path}: {line!r} does not have the columns {', '.join(heads)}")
        names[int(number)] = cells[heads.index("Name")].split(",")[0].strip()
    if sorted(names) != list(range(1, len(names) + 1)) or len(set(names.values())) < len(names):
        raise BadInput(f"{path} must number its classes from 1 without a gap, each with another name")
    if unknown := things - names.keys():
        raise BadInput(f"categoryMapping.txt names the classes {sorted(unknown)[:5]}, which {path} lacks")
    return tuple(Category(i, names[i], i in things, default_colour(i)) for i in sorted(names))


def _lines(path: Path, origin: str) -> list[str]:
    try:
        lines = [line for line in read_text(path, MAX_DATA_JSON_BYTES).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); it comes with {origin}") from None
    if len(lines) < 2:
        raise BadInput(f"{path} lists no classes; expected is the file that comes with {origin}")
    return lines


def _check_found(pairs: Mapping[str, list[Pair]], source: Path, wanted: str) -> None:
    if not source.is_dir():
        raise BadInput(f"the data folder {source} does not exist or is not a folder")
    if not any(pairs.values()):
        raise BadInput(f"{source} holds none of these images; wanted are {wanted}")


def _converted(
    pairs: Mapping[str, list[Pair]], convert: Callable[[Path, Path], NewImage], progress: Progress
) -> dict[str, Iterator[NewImage]]:
    total = sum(map(len, pairs.values()))
    done = 0

    def samples(split: str) -> Iterator[NewImage]:
        nonlocal done
        for image, truth in pairs[split]:
            sample = convert(image, truth)
            _check_size(image, sample)
            yield sample
            done += 1
            progress(done, total)

    return {split: samples(split) for split, found in pairs.items() if found}


def _check_size(image: Path, sample: NewImage) -> None:
    import PIL.Image

    try:
        with PIL.Image.open(image) as opened:
            width, height = opened.size
    except Exception as error:
        raise BadInput(f"{image} cannot be read as an image: {error}") from None
    if (height, width) != sample.ids.shape:
        tall, wide = sample.ids.shape
        raise BadInput(f"{image} is {width} x {height}, but its annotation is {wide} x {tall}")


def _read_pixels(path: Path, channels: int) -> NDArray[np.int32]:
    """(H, W) for one channel of up to 16 bits, else (H, W, channels); raises BadInput for another image."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    # Pillow's decoders raise many types on hostile bytes (SyntaxError, struct.error, ValueError, ...).
    except Exception as error:
        raise BadInput(f"{path} cannot be read as an image: {error}") from None
    modes: tuple[Any, ...] = ("L", "I", "I;16", "I;16B") if channels == 1 else ("RGB",)
    if mode not in modes:
        raise BadInput(f"{path} is of mode {mode}; it must be one of {', '.join(modes)}")
    return pixels.astype(np.int32)


CONVERTERS: dict[str, Callable[[Path, Path, Progress], Path]] = {
    "cityscapes": convert_cityscapes,
    "ade20k": convert_ade20k,
}
