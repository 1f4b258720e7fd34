"""The command that uses an engine on photographs and videos: predict."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional

import typer

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_json, progress_bar, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from vitkit.runtimes.engine import Engine
    from vitkit.runtimes.panoptic import Panoptic, Segment

# Lines of the legend below a video: its height must not change between frames.
_VIDEO_LEGEND = 3


def predict(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, as vitkit export writes it.")],
    images: Annotated[
        list[Path], typer.Argument(help="Image files; of panoptic networks also videos (mp4, avi, mov, mkv).")
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Folder for the pictures with results drawn on them."),
    ] = None,
    json: JsonFlag = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Panoptic: a few pixels at borders may differ, in less time.")
    ] = False,
    every: Annotated[int, typer.Option("--every", help="Of a video, take every so many frames.")] = 1,
) -> None:
    """Run an engine on images and draw the results.

    Classification prints the top classes; for PS-ViT an arrow goes from each sampling point's first
    position to its last. Panoptic segmentation prints what is in an image; with -o it leaves an overlay of
    each, and all segments in COCO's panoptic format: OUT/predictions.json and OUT/predictions/*.png. A
    video's overlay is NAME.mp4, and its frames are NAME_000000, NAME_000001, ... in the predictions.
    """
    from vitkit.runtimes.engine import open_engine

    _check_images(images, every)
    with open_engine(artifact, decode={"fast": True} if fast else None) as engine:
        if engine.card.task == "panoptic":
            _segment(engine, images, out, json, every)
        else:
            _classify(engine, images, out, json)


def _check_images(images: list[Path], every: int) -> None:
    from vitkit.pictures.video import is_video
    from vitkit.runtimes.errors import BadInput, BadRequest

    for path in images:
        try:
            found = path.is_file()
        except (OSError, ValueError) as error:
            raise BadInput(f"the image {path} cannot be opened: {error}") from None
        if not found:
            raise BadInput(f"the image {path} does not exist or is not a file")
    if every < 1:
        raise BadRequest(f"--every is {every}; it must be at least 1")
    if every > 1 and not any(map(is_video, images)):
        raise BadRequest("--every is for videos, and there is none")


def _classify(engine: Engine[Any], images: list[Path], out: Path | None, json: bool) -> None:
    from vitkit.pictures.classification import draw
    from vitkit.pictures.video import is_video
    from vitkit.runtimes.errors import BadRequest

    if videos := [path for path in images if is_video(path)]:
        raise BadRequest(
            f"{videos[0]} is a video; {engine.card.name} is no panoptic network, it takes images"
        )
    photos = [_read(path) for path in images]
    names = [f"{name}.png" for name in _names(images)]
    if out is not None:
        _check_pictures(out, names, images)
    results = engine(photos)
    if out is not None:
        for name, photo, result in zip(names, photos, results, strict=True):
            _save(draw(photo, result), out / name)
        say(f"{len(names)} pictures in {out}")
    if json:
        rows = [
            {"image": str(p), "top": [t.__dict__ for t in r.top]}
            for p, r in zip(images, results, strict=True)
        ]
        print_json(rows)
        return
    for path, result in zip(images, results, strict=True):
        shown = ", ".join(f"{label.name} {label.probability:.1%}" for label in result.top[:3])
        typer.echo(f"{path}: {shown}")


class _Found(NamedTuple):
    """The result of an image, or of a frame of a video, and its name among the predictions."""

    path: Path
    frame: int | None
    image_id: int | str
    result: Panoptic

    def row(self) -> dict[str, Any]:
        """The segments as plain numbers and texts, for JSON."""
        segments = [
            {"id": s.id, "label": s.label, "score": s.score, "area": s.area, "thing": s.thing}
            for s in self.result.segments
        ]
        frame = {} if self.frame is None else {"frame": self.frame}
        return {"image": str(self.path), **frame, "segments": segments}

    def line(self) -> str:
        """`photo.jpg: 3 person, 1 car, sky, road`."""
        frame = "" if self.frame is None else f" frame {self.frame}"
        return f"{self.path}{frame}: {_listed(self.result.segments)}"


def _listed(segments: Sequence[Segment]) -> str:
    things = Counter(s.label for s in segments if s.thing)
    stuff = dict.fromkeys(s.label for s in segments if not s.thing)
    return ", ".join([*(f"{n} {name}" for name, n in things.most_common()), *stuff]) or "nothing found"


def _segment(engine: Engine[Any], images: list[Path], out: Path | None, json: bool, every: int) -> None:
    rows: list[dict[str, Any]] = []
    lines: list[str] = []

    def note(found: _Found) -> None:
        if json:
            rows.append(found.row())
        elif out is None:
            typer.echo(found.line())
        elif found.frame is None:
            # Not shown yet: the progress bar would stand between.
            lines.append(found.line())

    names = _names(images)
    if out is None:
        for found in _results(engine, images, names, None, every):
            note(found)
    else:
        _write(engine, images, names, out, every, note)
        say(f"{len(names)} overlays and predictions.json in {out}")
    if json:
        print_json(rows)
    for line in lines:
        typer.echo(line)


def _write(
    engine: Engine[Any],
    images: list[Path],
    names: list[str],
    out: Path,
    every: int,
    note: Callable[[_Found], None],
) -> None:
    """Leave overlays and predictions in a folder; `note` hears every result."""
    from vitkit.data.coco.write import check_predictions_path, write_predictions
    from vitkit.evaluate.panoptic import card_categories, coco_segments
    from vitkit.pictures.video import is_video

    named = zip(images, names, strict=True)
    pictures = [f"{name}.mp4" if is_video(path) else f"{name}.png" for path, name in named]
    _check_pictures(out, pictures, images)
    check_predictions_path(out / "predictions.json")
    total, categories = sum(_count(path, every) for path in images), card_categories(engine.card)
    with progress_bar("segmenting") as progress:

        def predictions() -> Iterator[tuple[int | str, NDArray[np.int32], tuple[Any, ...]]]:
            for done, found in enumerate(_results(engine, images, names, out, every), start=1):
                note(found)
                yield found.image_id, found.result.ids, coco_segments(found.result, categories)
                progress(done, max(done, total))

        write_predictions(out / "predictions.json", predictions(), categories)


def _count(path: Path, every: int) -> int:
    """Images in a file, of a video as many as its header tells."""
    from vitkit.pictures.video import is_video, open_video

    if not is_video(path):
        return 1
    with open_video(path) as video:
        return -(-video.count // every)


def _results(
    engine: Engine[Any], images: list[Path], names: list[str], out: Path | None, every: int
) -> Iterator[_Found]:
    """Segment images and frames one by one; overlays go to `out` where it is given."""
    from vitkit.pictures.video import is_video, open_video

    for number, (path, name) in enumerate(zip(images, names, strict=True)):
        image_id = _image_id(name, number)
        if not is_video(path):
            photo = _read(path)
            result = engine(photo)
            if out is not None:
                _save(_overlay(photo, result), out / f"{name}.png")
            yield _Found(path, None, image_id, result)
            continue
        with open_video(path) as video, _video_out(out, name, video.fps / every) as append:
            for frame, photo in video.frames(every):
                result = engine(photo)
                append(photo, result)
                yield _Found(path, frame, f"{_image_id(name, number, text=True)}_{frame:06d}", result)


def _read(path: Path) -> NDArray[np.uint8]:
    from vitkit.runtimes.image import check_image, read_image

    return check_image(read_image(path), str(path))


def _overlay(photo: NDArray[np.uint8], result: Panoptic, lines: int | None = None) -> Image.Image:
    from vitkit.pictures.panoptic import draw

    return draw(photo, result, lines=lines)


@contextmanager
def _video_out(
    out: Path | None, name: str, fps: float
) -> Iterator[Callable[[NDArray[np.uint8], Panoptic], None]]:
    """A function that adds the overlay of a frame to `out`/`name`.mp4; it does nothing without `out`."""
    from vitkit.pictures.video import write_video

    if out is None:
        yield lambda photo, result: None
        return
    with write_video(out / f"{name}.mp4", fps) as append:
        yield lambda photo, result: append(_overlay(photo, result, _VIDEO_LEGEND))


def _image_id(name: str, number: int, text: bool = False) -> int | str:
    """COCO's own number where the file is named by it, so that its truth is found; else the name itself."""
    from urllib.parse import quote

    if not text and re.fullmatch("[0-9]{12}", name):
        return int(name)
    # The PNG is named by the id, and the file system bounds that.
    return name if name.isprintable() and len(quote(name, safe="")) <= 200 else f"image {number}"


def _names(images: Iterable[Path]) -> list[str]:
    """A name for each image: its file's without the suffix, numbered where two share theirs."""
    names: dict[str, None] = {}
    for path in images:
        numbered = (f"{path.stem}-{i}" for i in itertools.count(2))
        names[next(n for n in itertools.chain([path.stem], numbered) if n not in names)] = None
    return list(names)


def _save(picture: Image.Image, path: Path) -> None:
    from vitkit.runtimes.errors import BadRequest

    try:
        picture.save(path)
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error}") from None


def _check_pictures(out: Path, names: list[str], images: list[Path]) -> None:
    """Make the folder for pictures; raises BadRequest where it cannot be, or where one would hit an input."""
    from vitkit.runtimes.errors import BadRequest

    try:
        out.mkdir(parents=True, exist_ok=True)
        read = {path.resolve() for path in images}
        for name in names:
            if (out / name).resolve() in read or (out / name).is_dir():
                raise BadRequest(f"{out / name} is in the way of a picture; name another folder")
    except OSError as error:
        raise BadRequest(f"the pictures cannot be written to {out}: {error}") from None
