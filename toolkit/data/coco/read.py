"""Reading COCO's panoptic format: one split with its truth, or predictions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn
from unicodedata import normalize

from vitkit.data.coco import Category, PanopticImage, PanopticSet, SegmentInfo
from vitkit.data.coco.json_file import Complain, JsonFile
from vitkit.runtimes.errors import BadInput

_LAYOUT = (
    "wanted are DIR/annotations/panoptic_<split>.json with its PNGs in DIR/annotations/panoptic_<split>/ "
    "and the images in DIR/<split>/"
)


def find_splits(data: Path) -> dict[str, Path]:
    """The splits of a data set and their JSON files, by name; raises BadInput if there is none."""
    if not data.is_dir():
        raise BadInput(f"the data folder {data} does not exist or is not a folder; {_LAYOUT}")
    found = sorted((data / "annotations").glob("panoptic_?*.json"))
    # Files beside a set have similar names; only one with a folder of PNGs is a split.
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

    The PNGs are in the folder named as the JSON without its suffix, or beside the JSON. Area, box, crowd
    and score of a segment may be absent. Raises BadInput naming the first fault.
    """
    reader = JsonFile(json, _refuse)
    body = reader.body() or {}
    masks = NamedFiles(json.with_suffix("") if json.with_suffix("").is_dir() else json.parent)
    found: dict[int | str, tuple[Path, tuple[SegmentInfo, ...]]] = {}
    for where, entry in reader.entries(body, "annotations"):
        number, name = reader.image_id(where, entry, "image_id"), reader.file_name(where, entry)
        segments = reader.segments(where, entry, None)
        if number is None or name is None:
            continue
        if number in found:
            reader.fault(f"{where}: the image id {number!r} occurs twice")
        mask = masks.find(name)
        if not is_file(mask):
            raise BadInput(f"{mask} is missing; {where} of {json} names it")
        found[number] = (mask, segments)
    return found


def _refuse(file: Path, message: str) -> NoReturn:
    raise BadInput(f"{file}: {message}")


class SplitReader(JsonFile):
    """Reads one split; afterwards `images` and `masks` hold every file that its JSON names."""

    def __init__(self, data: Path, split: str, source: Path, complain: Complain) -> None:
        super().__init__(source, complain)
        places = [data / split, data / "input_images"]
        self.images = NamedFiles(next((place for place in places if place.is_dir()), data / split))
        self.masks = NamedFiles(source.with_suffix(""))

    def read(self) -> PanopticSet | None:
        """The split; None, after a fault, if its JSON cannot be read."""
        body = self.body()
        if body is None:
            return None
        categories = self._categories(body)
        table = self._images(body)
        for folder in (self.images.folder, self.masks.folder):
            if not folder.is_dir():
                self.complain(folder, f"the folder is missing; {self.source} needs it")
        images = self._annotations(body, table, {category.id for category in categories})
        for number in table.keys() - {image.image_id for image in images}:
            self.fault(f"the image {table[number].name!r} (id {number!r}) has no annotation")
        if not images:
            self.fault("it annotates no image")
        return PanopticSet(categories, tuple(sorted(images, key=lambda image: image.file)), self.source)

    def _categories(self, body: dict[str, Any]) -> tuple[Category, ...]:
        found: dict[int, Category] = {}
        names: set[str] = set()
        for where, entry in self.entries(body, "categories"):
            number = self.integer(where, entry, "id", 0, 2**31 - 1)
            name = self.text(where, entry, "name")
            thing = self.flag(where, entry, "isthing")
            if name is not None and normalize("NFC", name) in names:
                self.fault(f"{where}: the category name {name!r} occurs twice")
            if number in found:
                self.fault(f"{where}: the category id {number} occurs twice")
            elif number is not None:
                label = name or f"category {number}"
                names.add(normalize("NFC", label))
                found[number] = Category(number, label, thing, self.colour(where, entry, number))
        if not found:
            self.fault("it names no category")
        return tuple(found[number] for number in sorted(found))

    def _images(self, body: dict[str, Any]) -> dict[int | str, _ImageEntry]:
        found: dict[int | str, _ImageEntry] = {}
        for where, entry in self.entries(body, "images"):
            number, name = self.image_id(where, entry, "id"), self.file_name(where, entry)
            height, width = (self._side(where, entry, key) for key in ("height", "width"))
            if name is None:
                continue
            path = self.images.find(name)
            if path in self.images.named:
                self.fault(f"{where}: the file {name!r} occurs twice")
            self.images.named.add(path)
            if number in found:
                self.fault(f"{where}: the image id {number!r} occurs twice")
            elif number is not None:
                found[number] = _ImageEntry(name, path, height, width)
        return found

    def _side(self, where: str, entry: dict[str, Any], key: str) -> int | None:
        return None if entry.get(key) is None else self.integer(where, entry, key, 1, 2**16)

    def _annotations(
        self, body: dict[str, Any], table: Mapping[int | str, _ImageEntry], known: Collection[int]
    ) -> list[PanopticImage]:
        found: dict[int | str, PanopticImage] = {}
        for where, entry in self.entries(body, "annotations"):
            number = self.image_id(where, entry, "image_id")
            where = f"{where} (image {number!r})"
            image = None if number is None else table.get(number)
            mask = self._mask(where, entry, image)
            segments = self.segments(where, entry, known)
            if mask in self.masks.named:
                self.fault(f"{where}: another annotation names the file {mask.name!r}, too")
            if mask is not None:
                self.masks.named.add(mask)
            if number in found:
                self.fault(f"{where}: the image has another annotation")
            elif number is not None and image is None:
                self.fault(f"{where}: there is no such image")
            elif number is not None and image is not None and mask is not None:
                found[number] = PanopticImage(number, image.path, mask, image.height, image.width, segments)
                self._check_files(found[number], where)
        return list(found.values())

    def _mask(self, where: str, entry: dict[str, Any], image: _ImageEntry | None) -> Path | None:
        if entry.get("file_name") is None and image is not None:
            # COCO's own tools replace the suffix, too.
            return self.masks.find(str(PurePosixPath(image.name).with_suffix(".png")))
        name = self.file_name(where, entry)
        return None if name is None else self.masks.find(name)

    def _check_files(self, image: PanopticImage, where: str) -> None:
        for files, path in ((self.images, image.file), (self.masks, image.mask)):
            if files.folder.is_dir() and not is_file(path):
                self.complain(path, f"the file is missing; {where} of {self.source} needs it")


class _ImageEntry(NamedTuple):
    """An image as the JSON lists it, with its file; `height` and `width` are None if it leaves them out."""

    name: str
    path: Path
    height: int | None
    width: int | None


class NamedFiles:
    """The files of a folder under the names that a JSON gives them; `named` are those asked for so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.named: set[Path] = set()
        self._listing: dict[str, Path] | None = None

    def find(self, name: str) -> Path:
        """The file of a name, which may begin with the folder's name or be in another Unicode normal form.

        A path that does not exist if there is no such file.
        """
        if is_file(self.folder / name):
            return self.folder / name
        if self._listing is None:
            paths = (path for path in self.folder.rglob("*") if path.is_file())
            self._listing = {_normal(path.relative_to(self.folder).as_posix()): path for path in paths}
        inner = _normal(name.removeprefix(f"{self.folder.name}/"))
        return self._listing.get(_normal(name)) or self._listing.get(inner) or self.folder / name


def _normal(name: str) -> str:
    return normalize("NFC", name)


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that the file system cannot hold is none."""
    try:
        return path.is_file()
    except OSError:
        return False
