"""COCO's panoptic format, the one layout of panoptic data on disk: reading, writing and checking it.

    DIR/annotations/panoptic_<split>.json    categories, images, and the segments of every image
    DIR/annotations/panoptic_<split>/*.png   segment ids as colours: id = R + 256 G + 65536 B, 0 is void
    DIR/<split>/*                            the photographs

The panoptic_<split>.json files with their PNG folders may also lie directly in DIR; the photographs may then
be in DIR/input_images. The format: https://cocodataset.org/#format-data, "Panoptic Segmentation".
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
import urllib.parse
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.files import atomic_folder, check_writable, write_text
from vitkit.runtimes.image import find_images, read_image

Ids = NDArray[np.int32]
Box = tuple[int, int, int, int]
Complain = Callable[[Path, str], None]
Progress = Callable[[int, int], object]

# Three bytes of a pixel.
MAX_ID = 2**24 - 1
NO_BOX: Box = (0, 0, 0, 0)
_LAYOUT = (
    "wanted are DIR/annotations/panoptic_<split>.json with its PNGs in DIR/annotations/panoptic_<split>/ "
    "and the photographs in DIR/<split>/"
)


@dataclass(frozen=True)
class Category:
    """A class of segments: a kind of thing, whose instances count, or of stuff. `colour` is RGB, 0..255."""

    id: int
    name: str
    thing: bool
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Segment:
    """One segment of an image; `id` is its value in the PNG (1..2^24 - 1).

    `area` is in pixels, `box` (x, y, width, height); both are 0 where a prediction's JSON leaves them out.
    A `crowd` is a region of instances that nobody told apart. `score` belongs to predictions.
    """

    id: int
    category_id: int
    area: int
    crowd: bool = False
    box: Box = NO_BOX
    score: float | None = None


@dataclass(frozen=True)
class PanopticImage:
    """A photograph `file`, the PNG of its segment ids `mask`, their size in pixels, and the segments."""

    image_id: int | str
    file: Path
    mask: Path
    height: int
    width: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class PanopticSet:
    """One split: categories by id, images by file name, and the JSON it was read from."""

    categories: tuple[Category, ...]
    images: tuple[PanopticImage, ...]
    source: Path


@dataclass(frozen=True)
class Sample:
    """An image to be written: `photo` is a file, which is linked, or (H, W, 3) uint8 RGB, saved as PNG.

    `file_name` is the photograph's name in the split's folder; `ids` is (H, W).
    """

    image_id: int | str
    file_name: str
    photo: Path | NDArray[np.uint8]
    ids: NDArray[np.integer[Any]]
    segments: tuple[Segment, ...]


class Problem(NamedTuple):
    """Something wrong with a data set, and the file in which it is."""

    file: Path
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


# --- segment ids ---------------------------------------------------------------------------------------


def read_ids(path: Path) -> Ids:
    """The segment ids of a PNG, (H, W) int32: R + 256 G + 65536 B. Alpha and EXIF tags are ignored.

    Raises BadInput where the file cannot be read, or is not RGB(A) with 8 bits a channel.
    """
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            # Pillow calls 16-bit colour plain RGB; the decoder's raw mode tells.
            if image.mode not in ("RGB", "RGBA") or any(";16" in str(tile[3]) for tile in image.tile):
                raise BadInput(
                    f"{path} is no image of segment ids: it must be RGB with 8 bits a channel, "
                    f"its mode is {image.mode} ({image.format})"
                )
            pixels = np.asarray(image)
    except BadInput:
        raise
    # Pillow's decoders raise many types on hostile bytes (SyntaxError, struct.error, ValueError, ...).
    except Exception as error:
        raise BadInput(f"{path} cannot be read as an image: {error}") from None
    padded = np.zeros((*pixels.shape[:2], 4), np.uint8)
    padded[..., :3] = pixels[..., :3]
    return padded.view("<i4")[..., 0].astype(np.int32)


def write_ids(path: Path, ids: NDArray[np.integer[Any]]) -> None:
    """Write (H, W) segment ids as a PNG, whole or not at all.

    Raises BadInput where `ids` is not a two-dimensional array of 0..2^24 - 1, BadRequest where the file
    cannot be written.
    """
    import PIL.Image

    check_ids(ids, f"the ids for {path}")
    pixels = np.ascontiguousarray(ids, "<i4").view(np.uint8).reshape(*ids.shape, 4)[..., :3]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BadRequest(f"cannot write {path}: {error}") from None


def check_ids(ids: NDArray[np.integer[Any]], what: str) -> None:
    """Raises BadInput where `ids` is not a filled (H, W) array of whole numbers from 0 to 2^24 - 1."""
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise BadInput(f"{what}: shape {ids.shape} of {ids.dtype}; wanted are whole numbers, (height, width)")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > MAX_ID:
        raise BadInput(f"{what}: id {low if low < 0 else high} is outside 0 to {MAX_ID}, what a PNG holds")


def measure_segments(ids: NDArray[np.integer[Any]]) -> dict[int, tuple[int, Box]]:
    """Id -> (pixels, box as (x, y, width, height)) of everything in (H, W) `ids` but void."""
    height, width = ids.shape
    found = np.unique(ids)
    # Untouched pages of such a table cost nothing; sorting every pixel would.
    table = np.zeros(int(found[-1]) + 1, np.int32)
    table[found] = np.arange(len(found))
    index = table[ids]
    by_row, by_column = index.ravel(), index.T.ravel()
    rows, columns = np.repeat(np.arange(height), width), np.repeat(np.arange(width), height)
    areas = np.bincount(by_row, minlength=len(found))
    # Of several writes to one place the last one stays: the lowest row, and backwards the highest.
    top, bottom, left, right = np.empty((4, len(found)), np.int64)
    top[by_row[::-1]], bottom[by_row] = rows[::-1], rows
    left[by_column[::-1]], right[by_column] = columns[::-1], columns
    boxes = np.stack([left, top, right - left + 1, bottom - top + 1], axis=1).tolist()
    measured = zip(found.tolist(), areas.tolist(), boxes, strict=True)
    return {number: (area, (x, y, w, h)) for number, area, (x, y, w, h) in measured if number}


def describe_segments(
    ids: NDArray[np.integer[Any]], categories: Mapping[int, int], crowds: Collection[int] = ()
) -> tuple[Segment, ...]:
    """The segments in (H, W) `ids`, measured, by id; `categories` maps ids to category ids.

    Raises BadInput where an id of the map has no category.
    """
    measured = measure_segments(ids)
    if unknown := sorted(measured.keys() - categories.keys()):
        raise BadInput(f"{_some(unknown)} in the map of segments: no category was given")
    return tuple(
        Segment(number, categories[number], area, number in crowds, box)
        for number, (area, box) in measured.items()
    )


# --- reading -------------------------------------------------------------------------------------------


def find_splits(data: Path) -> dict[str, Path]:
    """The splits of a data set and their JSON files, by name; raises BadInput where there is none."""
    if not data.is_dir():
        raise BadInput(f"the data folder {data} does not exist or is not a folder; {_LAYOUT}")
    found = sorted((data / "annotations").glob("panoptic_?*.json"))
    # Beside a set lie files of similar names: only one with a folder of PNGs is a split.
    found = found or [path for path in sorted(data.glob("panoptic_?*.json")) if path.with_suffix("").is_dir()]
    if not found:
        raise BadInput(f"{data} holds no panoptic data; {_LAYOUT}")
    return {path.stem.removeprefix("panoptic_"): path for path in found}


def read_split(data: Path, split: str | None = None) -> PanopticSet:
    """Read one split's JSON; None: the only split, else the one whose name starts with `val`.

    Everything in the JSON is checked, and that all files exist; what is in the PNGs is left to
    `check_panoptic`. Raises BadInput naming the first fault, or the choices for `split`.
    """
    splits = find_splits(data)
    if split is None:
        names = list(splits) if len(splits) == 1 else [name for name in splits if name.startswith("val")]
        if len(names) != 1:
            raise BadInput(f"{data} has the splits {', '.join(splits)}; name one of them")
        (split,) = names
    if split not in splits:
        raise BadInput(f"{data} has no split {split!r}; it has {', '.join(splits)}")
    found = _Reader(data, split, splits[split], _refuse).read()
    assert found is not None, "a reader that refuses does not return nothing"
    return found


def read_predictions(json: Path) -> dict[int | str, tuple[Path, tuple[Segment, ...]]]:
    """Predictions in COCO's format: image id -> (PNG, segments).

    The PNGs lie in the folder named as the JSON without its suffix, or beside the JSON. Area, box, crowd
    and score of a segment may be absent. Raises BadInput naming the first fault.
    """
    reader = _Json(json, _refuse)
    body = reader.body() or {}
    folder = json.with_suffix("") if json.with_suffix("").is_dir() else json.parent
    found: dict[int | str, tuple[Path, tuple[Segment, ...]]] = {}
    for where, entry in reader.entries(body, "annotations"):
        number, name = reader.image_id(where, entry, "image_id"), reader.file_name(where, entry)
        segments = reader.segments(where, entry, None)
        if number is None or name is None:
            continue
        if number in found:
            reader.wrong(f"{where}: the image id {number!r} occurs twice")
        if not _is_file(folder / name):
            raise BadInput(f"{folder / name} is missing; {where} of {json} names it")
        found[number] = (folder / name, segments)
    return found


def _refuse(file: Path, message: str) -> NoReturn:
    raise BadInput(f"{file}: {message}")


class _Json:
    """Takes the JSON of a panoptic set apart, trusting nothing in it.

    What is wrong goes to `complain`, which raises (reading) or takes a note (checking): then the faulty
    part is left out and the rest looked at.
    """

    def __init__(self, source: Path, complain: Complain) -> None:
        self.source = source
        self.complain = complain

    def wrong(self, message: str) -> None:
        self.complain(self.source, message)

    def body(self) -> dict[str, Any] | None:
        def refuse(constant: str) -> NoReturn:
            raise ValueError(f"{constant} is no number of JSON")

        try:
            body = json.loads(self.source.read_text(encoding="utf-8-sig"), parse_constant=refuse)
        except (OSError, ValueError, RecursionError) as error:
            self.wrong(f"it cannot be read as JSON: {error}")
            return None
        if not isinstance(body, dict):
            self.wrong(f"it holds {_kind(body)}; wanted is an object with images, annotations and categories")
            return None
        return body

    def entries(
        self, body: dict[str, Any], key: str, place: str = ""
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        """The objects of a list, each with the words that tell a reader where it is."""
        value = body.get(key)
        if not isinstance(value, list):
            self.wrong(f"{place}'{key}' is {_kind(value)}; wanted is a list")
            return
        for i, entry in enumerate(value):
            if isinstance(entry, dict):
                yield f"{place}{key}[{i}]", entry
            else:
                self.wrong(f"{place}{key}[{i}] is {_kind(entry)}; wanted is an object")

    def whole(self, where: str, entry: dict[str, Any], key: str, least: int, most: int) -> int | None:
        number = _whole(entry.get(key))
        if number is not None and least <= number <= most:
            return number
        self.wrong(f"{where}: '{key}' is {_shown(entry, key)}; wanted is a whole number, {least} to {most}")
        return None

    def flag(self, where: str, entry: dict[str, Any], key: str) -> bool:
        value = entry.get(key)
        if not (isinstance(value, (bool, int)) and value in (0, 1)):
            self.wrong(f"{where}: '{key}' is {_shown(entry, key)}; wanted is 0 or 1")
        return value == 1

    def text(self, where: str, entry: dict[str, Any], key: str) -> str | None:
        value = entry.get(key)
        # Printable also keeps out what no file system and no terminal takes.
        if isinstance(value, str) and value and value.isprintable():
            return value
        self.wrong(f"{where}: '{key}' is {_shown(entry, key)}; wanted is a text")
        return None

    def file_name(self, where: str, entry: dict[str, Any]) -> str | None:
        name = self.text(where, entry, "file_name")
        if name is None:
            return None
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            self.wrong(f"{where}: 'file_name' is {name!r}; it must lie in the folder of its split")
            return None
        return str(path)

    def image_id(self, where: str, entry: dict[str, Any], key: str) -> int | str | None:
        value = entry.get(key)
        number = _whole(value)
        if number is not None:
            return number
        if isinstance(value, str) and value and value.isprintable():
            return value
        self.wrong(f"{where}: '{key}' is {_shown(entry, key)}; wanted is a whole number or a text")
        return None

    def colour(self, where: str, entry: dict[str, Any], number: int) -> tuple[int, int, int]:
        if entry.get("color") is None:
            return default_colour(number)
        values = _wholes(entry["color"], 3)
        if values is None or not all(0 <= value <= 255 for value in values):
            self.wrong(f"{where}: 'color' is {_shown(entry, 'color')}; wanted are three numbers, 0 to 255")
            return default_colour(number)
        red, green, blue = values
        return red, green, blue

    def segments(
        self, where: str, entry: dict[str, Any], known: Collection[int] | None
    ) -> tuple[Segment, ...]:
        """The segments of an annotation; with `known` category ids it is the truth, and must be complete."""
        found: dict[int, Segment] = {}
        for place, item in self.entries(entry, "segments_info", f"{where}."):
            number = self.whole(place, item, "id", 1, MAX_ID)
            category = self.whole(place, item, "category_id", 0, 2**31 - 1)
            if number in found:
                self.wrong(f"{place}: the segment id {number} occurs twice in the image")
            elif number is not None:
                area, box = self._extent(place, item, required=known is not None)
                crowd = "iscrowd" in item and self.flag(place, item, "iscrowd")
                if known is not None and category is not None and category not in known:
                    self.wrong(f"{place}: 'category_id' is {category}, which is not among the categories")
                # -1 stands for an unusable category, which has been complained of.
                category = -1 if category is None else category
                found[number] = Segment(number, category, area, crowd, box, self._score(place, item))
        return tuple(found.values())

    def _extent(self, where: str, entry: dict[str, Any], required: bool) -> tuple[int, Box]:
        area: int | None = 0
        box = NO_BOX
        if required or entry.get("area") is not None:
            area = self.whole(where, entry, "area", 1 if required else 0, 2**31 - 1)
        if required or entry.get("bbox") is not None:
            values = _wholes(entry.get("bbox"), 4)
            if values is None or min(values) < 0:
                self.wrong(
                    f"{where}: 'bbox' is {_shown(entry, 'bbox')}; wanted are four whole numbers, "
                    "x, y, width and height"
                )
            else:
                box = (values[0], values[1], values[2], values[3])
        return area or 0, box

    def _score(self, where: str, entry: dict[str, Any]) -> float | None:
        value = entry.get("score")
        if value is None or (type(value) in (int, float) and abs(value) < 1e9):
            return value
        self.wrong(f"{where}: 'score' is {_shown(entry, 'score')}; wanted is a number")
        return None


class _Reader(_Json):
    """Reads one split; afterwards `photo_names` and `mask_names` hold every file that its JSON names."""

    def __init__(self, data: Path, split: str, source: Path, complain: Complain) -> None:
        super().__init__(source, complain)
        places = [data / split, data / "input_images"]
        self.photos = next((place for place in places if place.is_dir()), data / split)
        self.masks = source.with_suffix("")
        self.photo_names: dict[str, int | str | None] = {}
        self.mask_names: set[str] = set()

    def read(self) -> PanopticSet | None:
        body = self.body()
        if body is None:
            return None
        categories = self._categories(body)
        table = self._images(body)
        for folder in (self.photos, self.masks):
            if not folder.is_dir():
                self.complain(folder, f"the folder is missing; {self.source} needs it")
        images = self._annotations(body, table, {category.id for category in categories})
        for number in table.keys() - {image.image_id for image in images}:
            self.wrong(f"the image {table[number][0]!r} (id {number!r}) has no annotation")
        if not images:
            self.wrong("it annotates no image")
        return PanopticSet(categories, tuple(sorted(images, key=lambda image: image.file)), self.source)

    def _categories(self, body: dict[str, Any]) -> tuple[Category, ...]:
        found: dict[int, Category] = {}
        names: set[str] = set()
        for where, entry in self.entries(body, "categories"):
            number = self.whole(where, entry, "id", 0, 2**31 - 1)
            name = self.text(where, entry, "name")
            thing = self.flag(where, entry, "isthing")
            if name in names:
                self.wrong(f"{where}: the category name {name!r} occurs twice")
            if number in found:
                self.wrong(f"{where}: the category id {number} occurs twice")
            elif number is not None:
                label = name or f"category {number}"
                names.add(label)
                found[number] = Category(number, label, thing, self.colour(where, entry, number))
        if not found:
            self.wrong("it names no category")
        return tuple(found[number] for number in sorted(found))

    def _images(self, body: dict[str, Any]) -> dict[int | str, tuple[str, int, int]]:
        found: dict[int | str, tuple[str, int, int]] = {}
        for where, entry in self.entries(body, "images"):
            number, name = self.image_id(where, entry, "id"), self.file_name(where, entry)
            height = self.whole(where, entry, "height", 1, 2**16)
            width = self.whole(where, entry, "width", 1, 2**16)
            if name in self.photo_names:
                self.wrong(
                    f"{where}: the file {name!r} occurs twice, first as image {self.photo_names[name]!r}"
                )
            if name is not None:
                self.photo_names.setdefault(name, number)
            if number in found:
                self.wrong(f"{where}: the image id {number!r} occurs twice")
            elif number is not None and name is not None:
                # 0 stands for an unusable side, which has been complained of.
                found[number] = (name, height or 0, width or 0)
        return found

    def _annotations(
        self, body: dict[str, Any], table: dict[int | str, tuple[str, int, int]], known: Collection[int]
    ) -> list[PanopticImage]:
        found: dict[int | str, PanopticImage] = {}
        for where, entry in self.entries(body, "annotations"):
            number, name = self.image_id(where, entry, "image_id"), self.file_name(where, entry)
            where = f"{where} (image {number!r})"
            segments = self.segments(where, entry, known)
            if name in self.mask_names:
                self.wrong(f"{where}: another annotation names the file {name!r}, too")
            if name is not None:
                self.mask_names.add(name)
            if number in found:
                self.wrong(f"{where}: the image has another annotation")
            elif number is not None and number not in table:
                self.wrong(f"{where}: there is no such image")
            elif number is not None and name is not None:
                file, height, width = table[number]
                image = PanopticImage(number, self.photos / file, self.masks / name, height, width, segments)
                self._check_files(image, where)
                found[number] = image
        return list(found.values())

    def _check_files(self, image: PanopticImage, where: str) -> None:
        for folder, path in ((self.photos, image.file), (self.masks, image.mask)):
            if folder.is_dir() and not _is_file(path):
                self.complain(path, f"the file is missing; {where} of {self.source} needs it")


def _whole(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _wholes(value: object, count: int) -> list[int] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    numbers = [number for item in value if (number := _whole(item)) is not None]
    return numbers if len(numbers) == count else None


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "missing", bool: "true or false"}
    return kinds.get(type(value), "a number")


def _shown(entry: dict[str, Any], key: str) -> str:
    text = ascii(entry.get(key)) if key in entry else "missing"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(map(str, items[:5])) + more


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def default_colour(number: int) -> tuple[int, int, int]:
    """An RGB colour for a category without one, the same for the same id."""
    # Steps of the golden ratio: neighbours in number are far apart in hue.
    hue, value = (number * 0.6180339887) % 1, 0.55 + 0.45 * ((number * 0.7548776662) % 1)
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, value))
    return red, green, blue


# --- writing -------------------------------------------------------------------------------------------


def write_panoptic_set(
    out: Path, categories: Sequence[Category], splits: Mapping[str, Iterable[Sample]]
) -> Path:
    """Write samples, split by split as they come, in the layout of this module; returns `out`.

    The folder appears whole or not at all. A photograph given as a file is hard-linked, or copied where
    that cannot be. Raises BadRequest for an `out` that holds anything already or cannot be written, and
    BadInput for two samples of one name or ids that a PNG cannot hold.
    """
    check_new_folder(out)
    with atomic_folder(out) as folder:
        for split, samples in splits.items():
            _write_split(folder, split, categories, samples)
    return out


def check_new_folder(out: Path) -> None:
    """Raises BadRequest where `out` cannot be written, is a file, or is a folder that holds anything."""
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise BadRequest(f"the output {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        raise BadRequest(
            f"the output folder {out} is not empty; name a new folder, or remove it: rm -r {out}"
        )


def _write_split(folder: Path, split: str, categories: Sequence[Category], samples: Iterable[Sample]) -> None:
    source = folder / "annotations" / f"panoptic_{split}.json"
    source.with_suffix("").mkdir(parents=True)
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    written: set[Path] = set()
    for sample in samples:
        photo = folder / split / sample.file_name
        mask = (source.with_suffix("") / sample.file_name).with_suffix(".png")
        if mask in written:
            raise BadInput(f"two images of the split {split} have the name {sample.file_name!r}")
        written.add(mask)
        write_ids(mask, sample.ids)
        _write_photo(photo, sample.photo)
        height, width = sample.ids.shape
        images.append(
            {"id": sample.image_id, "file_name": sample.file_name, "height": height, "width": width}
        )
        annotations.append(
            {
                "image_id": sample.image_id,
                "file_name": mask.relative_to(source.with_suffix("")).as_posix(),
                "segments_info": [_segment_json(segment) for segment in sample.segments],
            }
        )
    body = {
        "images": images,
        "annotations": annotations,
        "categories": [_category_json(c) for c in categories],
    }
    write_text(source, json.dumps(body, ensure_ascii=False))


def _write_photo(path: Path, photo: Path | NDArray[np.uint8]) -> None:
    import PIL.Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(photo, Path):
            _link(photo, path)
        else:
            # Lightest compression: noise does not compress, and drawing should not wait for zlib.
            PIL.Image.fromarray(photo).save(path, compress_level=1)
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error}") from None


def _link(photo: Path, path: Path) -> None:
    try:
        # Resolved: a link to a symbolic link would break when that moves.
        os.link(photo.resolve(), path)
    except OSError:
        shutil.copyfile(photo, path)


def _segment_json(segment: Segment) -> dict[str, Any]:
    body = {
        "id": segment.id,
        "category_id": segment.category_id,
        "area": segment.area,
        "bbox": list(segment.box),
        "iscrowd": int(segment.crowd),
    }
    return body if segment.score is None else {**body, "score": segment.score}


def _category_json(category: Category) -> dict[str, Any]:
    return {
        "id": category.id,
        "name": category.name,
        "isthing": int(category.thing),
        "color": list(category.colour),
    }


def write_predictions(
    json: Path,
    predictions: Iterable[tuple[int | str, NDArray[np.integer[Any]], Sequence[Segment]]],
    categories: Sequence[Category] = (),
) -> None:
    """Write (image id, (H, W) segment ids, segments) in COCO's format, whole or not at all.

    `json` is a file `NAME.json`; the PNGs go into the folder `NAME` beside it, under COCO's names (twelve
    digits) or the image's id where that is a text. Raises BadRequest where either exists already or cannot
    be written, BadInput for an image id that occurs twice or ids that a PNG cannot hold.
    """
    check_predictions_path(json)
    folder = json.with_suffix("")
    json.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=json.parent))
    try:
        (work / "new").mkdir()
        annotations = _write_annotations(work / "new", predictions)
        body: dict[str, Any] = {"annotations": annotations}
        if categories:
            body["categories"] = [_category_json(category) for category in categories]
        _finish(work / "new", folder, json, body)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_predictions_path(json: Path) -> None:
    """Refuse, before any work, a name for predictions that cannot be used; raises BadRequest."""
    if json.suffix != ".json":
        raise BadRequest(
            f"the predictions {json} must be named *.json; their PNGs go into a folder beside it"
        )
    for path in (json, json.with_suffix("")):
        if path.exists():
            raise BadRequest(f"{path} exists already; name another file, or remove it: rm -r {path}")
    check_writable(json)


def _write_annotations(
    folder: Path, predictions: Iterable[tuple[int | str, NDArray[np.integer[Any]], Sequence[Segment]]]
) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    seen: set[int | str] = set()
    for number, ids, segments in predictions:
        if number in seen:
            raise BadInput(f"there are two predictions for the image {number!r}")
        seen.add(number)
        name = (
            f"{number:012d}.png" if isinstance(number, int) else f"{urllib.parse.quote(number, safe='')}.png"
        )
        write_ids(folder / name, ids)
        infos = [_segment_json(segment) for segment in segments]
        annotations.append({"image_id": number, "file_name": name, "segments_info": infos})
    return annotations


def _finish(new: Path, folder: Path, file: Path, body: dict[str, Any]) -> None:
    try:
        new.replace(folder)
    except OSError as error:
        raise BadRequest(f"cannot write {folder}: {error.strerror}") from None
    try:
        # Last: where the JSON is, everything is.
        write_text(file, json.dumps(body, ensure_ascii=False))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# --- checking ------------------------------------------------------------------------------------------


def check_panoptic(data: Path, progress: Progress = lambda done, total: None) -> list[Problem]:
    """Every inconsistency in a data set: of the JSON files, the PNGs, the photographs, and between them.

    `progress` hears (images done, images in all). Raises BadInput only where `data` holds no panoptic set.
    """
    problems: list[Problem] = []

    def note(file: Path, message: str) -> None:
        problems.append(Problem(file, message))

    readers = [_Reader(data, split, source, note) for split, source in find_splits(data).items()]
    sets = [(reader, found) for reader in readers if (found := reader.read()) is not None]
    total = sum(len(found.images) for _, found in sets)
    done = 0
    for reader, found in sets:
        if _names(found) != _names(sets[0][1]):
            note(found.source, f"its categories differ from those of {sets[0][1].source}")
        _check_strangers(reader, note)
        stuff = {category.id: category.name for category in found.categories if not category.thing}
        for image in found.images:
            _check_image(image, stuff, note)
            done += 1
            progress(done, total)
    return problems


def _names(found: PanopticSet) -> list[tuple[int, str, bool]]:
    return [(category.id, category.name, category.thing) for category in found.categories]


def _check_strangers(reader: _Reader, note: Complain) -> None:
    named: tuple[tuple[Path, Collection[str], str], ...] = (
        (reader.photos, reader.photo_names, "an image"),
        (reader.masks, reader.mask_names, "a mask"),
    )
    for folder, names, what in named:
        for path in find_images(folder) if folder.is_dir() else []:
            if path.relative_to(folder).as_posix() not in names:
                note(path, f"{reader.source} does not name it as {what}")


def _check_image(image: PanopticImage, stuff: Mapping[int, str], note: Complain) -> None:
    wanted = (image.height, image.width)
    photo = _read(read_image, image.file, note)
    if photo is not None and photo.shape[:2] != wanted:
        note(image.file, f"the image is {_size(photo.shape)}, its annotation says {_size(wanted)}")
    counts = Counter(segment.category_id for segment in image.segments if not segment.crowd)
    for category, count in counts.items():
        if count > 1 and category in stuff:
            note(image.mask, f"{count} segments are {stuff[category]}; stuff is one segment in an image")
    ids = _read(read_ids, image.mask, note)
    if ids is None:
        return
    if ids.shape != wanted:
        note(image.mask, f"the PNG is {_size(ids.shape)}, its annotation says {_size(wanted)}")
    measured = measure_segments(ids)
    if strangers := sorted(measured.keys() - {segment.id for segment in image.segments}):
        note(image.mask, f"segments_info does not list the ids {_some(strangers)} of the PNG")
    for segment in image.segments:
        _check_segment(segment, measured, image.mask, note)


def _check_segment(
    segment: Segment, measured: Mapping[int, tuple[int, Box]], mask: Path, note: Complain
) -> None:
    if segment.id not in measured:
        note(mask, f"segment {segment.id} of segments_info is not in the PNG")
        return
    area, box = measured[segment.id]
    # 0 and the empty box stand for what has been complained of.
    if segment.area not in (0, area):
        note(mask, f"segment {segment.id} has {area} pixels, segments_info says {segment.area}")
    if segment.box not in (NO_BOX, box):
        note(mask, f"segment {segment.id} has the box {list(box)}, segments_info says {list(segment.box)}")


def _read(read: Callable[[Path], NDArray[Any]], path: Path, note: Complain) -> NDArray[Any] | None:
    if not _is_file(path):
        return None
    try:
        return read(path)
    except BadInput as error:
        note(path, str(error).removeprefix(f"{path} "))
        return None


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"
