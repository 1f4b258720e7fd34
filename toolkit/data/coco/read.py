"""Reading COCO's panoptic format: one split with its truth, or predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from vitkit.data.coco import (
    NO_BOX,
    Box,
    Category,
    PanopticImage,
    PanopticSet,
    SegmentInfo,
    default_colour,
)
from vitkit.data.coco.ids import MAX_ID
from vitkit.runtimes.errors import BadInput

Complain = Callable[[Path, str], None]
_LAYOUT = (
    "wanted are DIR/annotations/panoptic_<split>.json with its PNGs in DIR/annotations/panoptic_<split>/ "
    "and the images in DIR/<split>/"
)


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
    found = SplitReader(data, split, splits[split], _refuse).read()
    assert found is not None, "a reader that refuses does not return nothing"
    return found


def read_predictions(json: Path) -> dict[int | str, tuple[Path, tuple[SegmentInfo, ...]]]:
    """Predictions in COCO's format: image id -> (PNG, segments).

    The PNGs lie in the folder named as the JSON without its suffix, or beside the JSON. Area, box, crowd
    and score of a segment may be absent. Raises BadInput naming the first fault.
    """
    reader = _Json(json, _refuse)
    body = reader.body() or {}
    folder = json.with_suffix("") if json.with_suffix("").is_dir() else json.parent
    found: dict[int | str, tuple[Path, tuple[SegmentInfo, ...]]] = {}
    for where, entry in reader.entries(body, "annotations"):
        number, name = reader.image_id(where, entry, "image_id"), reader.file_name(where, entry)
        segments = reader.segments(where, entry, None)
        if number is None or name is None:
            continue
        if number in found:
            reader.wrong(f"{where}: the image id {number!r} occurs twice")
        if not is_file(folder / name):
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
    ) -> tuple[SegmentInfo, ...]:
        """The segments of an annotation; with `known` category ids it is the truth, and must be complete."""
        found: dict[int, SegmentInfo] = {}
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
                found[number] = SegmentInfo(number, category, area, crowd, box, self._score(place, item))
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


class SplitReader(_Json):
    """Reads one split; afterwards `photo_names` and `mask_names` hold every file that its JSON names."""

    def __init__(self, data: Path, split: str, source: Path, complain: Complain) -> None:
        super().__init__(source, complain)
        places = [data / split, data / "input_images"]
        self.photos = next((place for place in places if place.is_dir()), data / split)
        self.masks = source.with_suffix("")
        self.photo_names: dict[str, int | str | None] = {}
        self.mask_names: set[str] = set()

    def read(self) -> PanopticSet | None:
        """The split; None if its JSON cannot be read, after a complaint."""
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
            if folder.is_dir() and not is_file(path):
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


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that the file system cannot hold is none."""
    try:
        return path.is_file()
    except OSError:
        return False
