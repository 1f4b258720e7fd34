"""Checking a data set in COCO's panoptic format: every inconsistency, with the file that it is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from vitkit.data.coco import Box, PanopticImage, PanopticSet, SegmentInfo
from vitkit.data.coco.ids import first_few, measure_segments, read_ids
from vitkit.data.coco.json_file import Complain
from vitkit.data.coco.read import SplitReader, find_splits, is_file
from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.image import read_image
from vitkit.runtimes.listing import find_images

Progress = Callable[[int, int], object]


class Problem(NamedTuple):
    """Something wrong with a data set, and the file in which it is."""

    file: Path
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def check_panoptic(data: Path, progress: Progress = lambda done, total: None) -> list[Problem]:
    """Every inconsistency in a data set: of the JSON files, the PNGs, the images, and between them.

    `progress` gets (images done, images in all). Absent areas and boxes are none: the PNGs have them. Raises
    BadInput only if `data` holds no panoptic set.
    """
    problems: list[Problem] = []

    def note(file: Path, message: str) -> None:
        problems.append(Problem(file, message))

    readers = [SplitReader(data, split, source, note) for split, source in find_splits(data).items()]
    sets = [(reader, found) for reader in readers if (found := reader.read()) is not None]
    total = sum(len(found.images) for _, found in sets)
    done = 0
    for reader, found in sets:
        if _names(found) != _names(sets[0][1]):
            note(found.source, f"its categories differ from those of {sets[0][1].source}")
        _check_unnamed(reader, note)
        stuff = {category.id: category.name for category in found.categories if not category.thing}
        for image in found.images:
            _check_image(image, stuff, note)
            done += 1
            progress(done, total)
    return problems


def _names(found: PanopticSet) -> list[tuple[int, str, bool]]:
    return [(category.id, category.name, category.thing) for category in found.categories]


def _check_unnamed(reader: SplitReader, note: Complain) -> None:
    for files, what in ((reader.images, "an image"), (reader.masks, "a mask")):
        for path in find_images(files.folder) if files.folder.is_dir() else []:
            if path not in files.named:
                note(path, f"{reader.source} does not name it as {what}")


def _check_image(image: PanopticImage, stuff: Mapping[int, str], note: Complain) -> None:
    ids, pixels = _read(read_ids, image.mask, note), _read(read_image, image.file, note)
    counts = Counter(segment.category_id for segment in image.segments if not segment.crowd)
    for category, count in counts.items():
        if count > 1 and category in stuff:
            note(image.mask, f"{count} segments are {stuff[category]}; stuff is one segment in an image")
    if image.height and image.width:
        expected, source = (image.height, image.width), "the JSON"
    elif ids is not None:
        expected, source = (ids.shape[0], ids.shape[1]), "the PNG of its segments"
    else:
        return
    if pixels is not None and pixels.shape[:2] != expected:
        note(image.file, f"the image is {_size(pixels.shape)}, in {source} it is {_size(expected)}")
    if ids is None:
        return
    if ids.shape != expected:
        note(image.mask, f"the PNG is {_size(ids.shape)}, in {source} it is {_size(expected)}")
    measured = measure_segments(ids)
    if unlisted := sorted(measured.keys() - {segment.id for segment in image.segments}):
        note(image.mask, f"segments_info does not list the ids {first_few(unlisted)} of the PNG")
    for segment in image.segments:
        _check_segment(segment, measured, image.mask, note)


def _check_segment(
    segment: SegmentInfo, measured: Mapping[int, tuple[int, Box]], mask: Path, note: Complain
) -> None:
    if segment.id not in measured:
        note(mask, f"segment {segment.id} of segments_info is not in the PNG")
        return
    area, box = measured[segment.id]
    if segment.area not in (None, area):
        note(mask, f"segment {segment.id} has {area} pixels, its 'area' is {segment.area}")
    if segment.box not in (None, box):
        note(mask, f"segment {segment.id} has the box {list(box)}, its 'bbox' is {list(segment.box or ())}")


def _read(read: Callable[[Path], NDArray[Any]], path: Path, note: Complain) -> NDArray[Any] | None:
    if not is_file(path):
        return None
    try:
        return read(path)
    except BadInput as error:
        note(path, str(error).removeprefix(f"{path} "))
        return None


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"
