"""The fields of COCO's panoptic JSON, each checked as it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from vitkit.data.coco import Box, SegmentInfo, default_colour
from vitkit.data.coco.ids import MAX_ID
from vitkit.runtimes.reading import MAX_DATA_JSON_BYTES, read_file

Complain = Callable[[Path, str], None]


class JsonFile:
    """The JSON of a panoptic set or of predictions, read field by field; nothing in it is trusted.

    Each fault goes to `complain`, which raises (reading) or takes a note (checking): then the faulty part is
    left out and the rest is read.
    """

    def __init__(self, source: Path, complain: Complain) -> None:
        self.source = source
        self.complain = complain

    def fault(self, message: str) -> None:
        """Complain of the JSON file itself."""
        self.complain(self.source, message)

    def body(self) -> dict[str, Any] | None:
        """The outermost object; None, after a fault, if it cannot be read."""

        def refuse(constant: str) -> NoReturn:
            raise ValueError(f"{constant} is no number of JSON")

        try:
            body = json.loads(read_file(self.source, MAX_DATA_JSON_BYTES), parse_constant=refuse)
        except (OSError, ValueError, RecursionError) as error:
            self.fault(f"it cannot be read as JSON: {error}")
            return None
        if not isinstance(body, dict):
            self.fault(
                f"it holds {_type_name(body)}; it must be an object with images, annotations and categories"
            )
            return None
        return body

    def entries(
        self, body: dict[str, Any], key: str, place: str = ""
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        """The objects of a list, each with its place for messages, such as `images[3]`."""
        value = body.get(key)
        if not isinstance(value, list):
            self.fault(f"{place}'{key}' is {_type_name(value)}; it must be a list")
            return
        for i, entry in enumerate(value):
            if isinstance(entry, dict):
                yield f"{place}{key}[{i}]", entry
            else:
                self.fault(f"{place}{key}[{i}] is {_type_name(entry)}; it must be an object")

    def integer(self, where: str, entry: dict[str, Any], key: str, least: int, most: int) -> int | None:
        """A field that is an integer within bounds; None after a fault."""
        number = _as_integer(entry.get(key))
        if number is not None and least <= number <= most:
            return number
        self.fault(f"{where}: '{key}' is {_excerpt(entry, key)}; it must be an integer, {least} to {most}")
        return None

    def flag(self, where: str, entry: dict[str, Any], key: str) -> bool:
        """A field that is 0 or 1; False after a fault."""
        value = entry.get(key)
        if not (isinstance(value, (bool, int)) and value in (0, 1)):
            self.fault(f"{where}: '{key}' is {_excerpt(entry, key)}; it must be 0 or 1")
        return value == 1

    def text(self, where: str, entry: dict[str, Any], key: str) -> str | None:
        """A field that is a printable text, not empty; None after a fault."""
        value = entry.get(key)
        # Printable also keeps out what no file system and no terminal takes.
        if isinstance(value, str) and value and value.isprintable():
            return value
        self.fault(f"{where}: '{key}' is {_excerpt(entry, key)}; it must be a text")
        return None

    def file_name(self, where: str, entry: dict[str, Any]) -> str | None:
        """The field file_name, a path within the folder of its split; None after a fault."""
        name = self.text(where, entry, "file_name")
        if name is None:
            return None
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            self.fault(f"{where}: 'file_name' is {name!r}; it must be inside the folder of its split")
            return None
        return str(path)

    def image_id(self, where: str, entry: dict[str, Any], key: str) -> int | str | None:
        """A field that identifies an image, an integer or a text; None after a fault."""
        value = entry.get(key)
        number = _as_integer(value)
        if number is not None:
            return number
        if isinstance(value, str) and value and value.isprintable():
            return value
        self.fault(f"{where}: '{key}' is {_excerpt(entry, key)}; it must be an integer or a text")
        return None

    def colour(self, where: str, entry: dict[str, Any], number: int) -> tuple[int, int, int]:
        """The field color of a category, RGB; the default of its id if it is absent, or after a fault."""
        if entry.get("color") is None:
            return default_colour(number)
        values = _as_integers(entry["color"], 3)
        if values is None or not all(0 <= value <= 255 for value in values):
            self.fault(f"{where}: 'color' is {_excerpt(entry, 'color')}; it must be three numbers, 0 to 255")
            return default_colour(number)
        red, green, blue = values
        return red, green, blue

    def segments(
        self, where: str, entry: dict[str, Any], known: Collection[int] | None
    ) -> tuple[SegmentInfo, ...]:
        """The segments of an annotation; of the truth, `known` are the ids of the categories."""
        found: dict[int, SegmentInfo] = {}
        for place, item in self.entries(entry, "segments_info", f"{where}."):
            number = self.integer(place, item, "id", 1, MAX_ID)
            category = self.integer(place, item, "category_id", 0, 2**31 - 1)
            if number in found:
                self.fault(f"{place}: the segment id {number} occurs twice in the image")
            elif number is not None:
                crowd = item.get("iscrowd") is not None and self.flag(place, item, "iscrowd")
                if known is not None and category is not None and category not in known:
                    self.fault(f"{place}: 'category_id' is {category}, which is not among the categories")
                # -1 stands for an unusable category, a fault noted above.
                category = -1 if category is None else category
                area = self._area(place, item, least=0 if known is None else 1)
                found[number] = SegmentInfo(
                    number, category, area, crowd, self._box(place, item), self._score(place, item)
                )
        return tuple(found.values())

    def _area(self, where: str, entry: dict[str, Any], least: int) -> int | None:
        if entry.get("area") is None:
            return None
        return self.integer(where, entry, "area", least, 2**31 - 1)

    def _box(self, where: str, entry: dict[str, Any]) -> Box | None:
        # Some tools write an empty list for a box that they did not compute.
        if entry.get("bbox") in (None, []):
            return None
        values = _as_integers(entry["bbox"], 4)
        if values is None or min(values) < 0:
            self.fault(
                f"{where}: 'bbox' is {_excerpt(entry, 'bbox')}; it must be four integers, "
                "x, y, width and height"
            )
            return None
        return values[0], values[1], values[2], values[3]

    def _score(self, where: str, entry: dict[str, Any]) -> float | None:
        value = entry.get("score")
        if value is None or (type(value) in (int, float) and abs(value) < 1e9):
            return value
        self.fault(f"{where}: 'score' is {_excerpt(entry, 'score')}; it must be a number")
        return None


def _as_integer(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_integers(value: object, count: int) -> list[int] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    numbers = [number for item in value if (number := _as_integer(item)) is not None]
    return numbers if len(numbers) == count else None


def _type_name(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "missing", bool: "true or false"}
    return kinds.get(type(value), "a number")


def _excerpt(entry: dict[str, Any], key: str) -> str:
    text = ascii(entry.get(key)) if key in entry else "missing"
    return text if len(text) <= 60 else f"{text[:60]}..."
