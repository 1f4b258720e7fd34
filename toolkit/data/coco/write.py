"""Writing COCO's panoptic format: a data set with its truth, or predictions."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.data.coco import Category, SegmentInfo
from vitkit.data.coco.ids import write_ids
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.files import atomic_folder, check_writable, write_text


@dataclass(frozen=True)
class NewImage:
    """An image to be written: `source` is a file, which is linked, or (H, W, 3) uint8 RGB, saved as PNG.

    `file_name` is the image's name in the folder of its split; `ids` is (H, W).
    """

    image_id: int | str
    file_name: str
    source: Path | NDArray[np.uint8]
    ids: NDArray[np.integer[Any]]
    segments: tuple[SegmentInfo, ...]


def write_panoptic_set(
    out: Path, categories: Sequence[Category], splits: Mapping[str, Iterable[NewImage]]
) -> Path:
    """Write images, split by split as they come, in the layout of `vitkit.data.coco`; returns `out`.

    The folder appears whole or not at all. An image given as a file is hard-linked, or copied if the file
    system has no hard links. Raises BadRequest for an `out` that is not empty or cannot be written, and
    BadInput for two images of one name or ids that a PNG cannot hold.
    """
    check_new_folder(out)
    with atomic_folder(out) as folder:
        for split, images in splits.items():
            _write_split(folder, split, categories, images)
    return out


def check_new_folder(out: Path) -> None:
    """Raises BadRequest if `out` cannot be written, is a file, or is a folder that is not empty."""
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise BadRequest(f"the output {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        raise BadRequest(
            f"the output folder {out} is not empty; name a new folder, or remove it: rm -r {out}"
        )


def _write_split(
    folder: Path, split: str, categories: Sequence[Category], images: Iterable[NewImage]
) -> None:
    json_file = folder / "annotations" / f"panoptic_{split}.json"
    json_file.with_suffix("").mkdir(parents=True)
    (folder / split).mkdir()
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    written: set[Path] = set()
    for image in images:
        mask = (json_file.with_suffix("") / image.file_name).with_suffix(".png")
        if mask in written:
            raise BadInput(f"two images of the split {split} have the name {image.file_name!r}")
        written.add(mask)
        write_ids(mask, image.ids)
        _write_image(folder / split / image.file_name, image.source)
        height, width = image.ids.shape
        entries.append({"id": image.image_id, "file_name": image.file_name, "height": height, "width": width})
        annotations.append(
            {
                "image_id": image.image_id,
                "file_name": mask.relative_to(json_file.with_suffix("")).as_posix(),
                "segments_info": [_segment_json(segment) for segment in image.segments],
            }
        )
    body = {
        "images": entries,
        "annotations": annotations,
        "categories": [_category_json(c) for c in categories],
    }
    write_text(json_file, json.dumps(body, ensure_ascii=False))


def _write_image(path: Path, source: Path | NDArray[np.uint8]) -> None:
    import PIL.Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            _link(source, path)
        else:
            # Lightest compression: noise does not compress, and drawing should not wait for zlib.
            PIL.Image.fromarray(source).save(path, compress_level=1)
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error}") from None


def _link(source: Path, path: Path) -> None:
    try:
        # Resolved: a link to a symbolic link would break when that moves.
        os.link(source.resolve(), path)
    except OSError:
        shutil.copyfile(source, path)


def _segment_json(segment: SegmentInfo) -> dict[str, Any]:
    body = {
        "id": segment.id,
        "category_id": segment.category_id,
        "area": segment.area,
        "bbox": None if segment.box is None else list(segment.box),
        "iscrowd": int(segment.crowd),
        "score": segment.score,
    }
    return {key: value for key, value in body.items() if value is not None}


def _category_json(category: Category) -> dict[str, Any]:
    return {
        "id": category.id,
        "name": category.name,
        "isthing": int(category.thing),
        "color": list(category.colour),
    }


def write_predictions(
    json: Path,
    predictions: Iterable[tuple[int | str, NDArray[np.integer[Any]], Sequence[SegmentInfo]]],
    categories: Sequence[Category] = (),
) -> None:
    """Write (image id, (H, W) segment ids, segments) in COCO's format, whole or not at all.

    `json` is a file `NAME.json`; the PNGs go into the folder `NAME` beside it, under COCO's names (twelve
    digits) or the image's id if that is a text. Raises BadRequest if either exists already or cannot
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
        _put_in_place(work / "new", folder, json, body)
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
    folder: Path, predictions: Iterable[tuple[int | str, NDArray[np.integer[Any]], Sequence[SegmentInfo]]]
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


def _put_in_place(new: Path, folder: Path, file: Path, body: dict[str, Any]) -> None:
    try:
        new.replace(folder)
    except OSError as error:
        raise BadRequest(f"cannot write {folder}: {error.strerror}") from None
    try:
        # The JSON comes last, so that it never names a missing PNG.
        write_text(file, json.dumps(body, ensure_ascii=False))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
