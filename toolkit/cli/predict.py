"""`vitkit predict`: an engine's results on images and videos, printed, drawn and saved."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
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


def predict(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, as vitkit export writes it.")],
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Image files, or folders with images; for segmentation also videos (mp4, avi, mov, mkv)."
        ),
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
    position to its last. Panoptic segmentation prints what is in an image; with -o it writes an overlay of
    each, and all segments in COCO's panoptic format: OUT/predictions.json and OUT/predictions/*.png. A
    video's overlay is NAME.mp4, and its frames are NAME_000000, NAME_000001, ... in the predictions.
    Semantic segmentation prints the share of each class, and -o writes overlays. Raw tensors are printed by
    name, shape and range; -o writes NAME.npz with all values.
    """
    from vitkit.runtimes.engine import open_engine

    files = _find_files(images, out)
    _check_every(every, files)
    with open_engine(artifact, decode={"fast": True} if fast else None) as engine:
        job = _Job(engine, files, out, every)
        job.check()
        rows = _print_as_they_come(job, json) if out is None else _write(job, out, json)
    if json:
        print_json(rows)


def _find_files(paths: list[Path], out: Path | None) -> list[Path]:
    """The files that are named, and the images of folders that are not in `out`, in the given order."""
    from vitkit.runtimes.errors import BadInput
    from vitkit.runtimes.listing import find_images

    files: list[Path] = []
    for path in paths:
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except (OSError, ValueError) as error:
            raise BadInput(f"the image {path} cannot be opened: {error}") from None
        if is_folder:
            found = [image for image in find_images(path) if out is None or not _is_below(image, out)]
            if not found:
                raise BadInput(f"the folder {path} holds no images")
            files += found
        elif is_file:
            files.append(path)
        else:
            raise BadInput(f"the image {path} does not exist or is not a file")
    return files


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _check_every(every: int, files: list[Path]) -> None:
    from vitkit.pictures.video import is_video
    from vitkit.runtimes.errors import BadRequest

    if every < 1:
        raise BadRequest(f"--every is {every}; it must be at least 1")
    if every > 1 and not any(map(is_video, files)):
        raise BadRequest("--every is for videos, and there is none")


class _Prediction(NamedTuple):
    """The result of an image, or of a frame of a video, and its name in the file of predictions."""

    path: Path
    frame: int | None
    image_id: int | str
    result: Any


class _Job:
    """An engine, the files that it is run on, and the modules of its task."""

    def __init__(self, engine: Engine[Any], files: list[Path], out: Path | None, every: int) -> None:
        from vitkit.runtimes.tasks import task_module

        self.engine, self.files, self.out, self.every = engine, files, out, every
        self.picture = task_module(engine.card.task, "picture")
        self.metric = task_module(engine.card.task, "metric")
        # Only tasks whose results cannot be drawn have another one.
        self.suffix = getattr(self.picture, "SUFFIX", ".png")
        self.names = _output_names(files)

    def check(self) -> None:
        """Raises BadRequest for videos if the task takes none, and for an `out` that cannot be used."""
        from vitkit.pictures.video import is_video
        from vitkit.runtimes.errors import BadRequest

        if self.picture.VIDEO_OPTIONS is None and (videos := [p for p in self.files if is_video(p)]):
            raise BadRequest(
                f"{videos[0]} is a video; {self.engine.card.name} does {self.engine.card.task}, which takes "
                "images"
            )
        if self.out is not None:
            named = zip(self.files, self.names, strict=True)
            pictures = [f"{name}.mp4" if is_video(path) else f"{name}{self.suffix}" for path, name in named]
            _check_pictures(self.out, pictures, self.files)

    def count(self) -> int:
        """Images and frames; of a video as many as its header has."""
        from vitkit.pictures.video import is_video, open_video

        total = 0
        for path in self.files:
            if is_video(path):
                with open_video(path) as video:
                    total += -(-video.count // self.every)
            else:
                total += 1
        return total

    def results(self) -> Iterator[_Prediction]:
        """Run the engine on images and frames one by one; pictures go to `out` if there is one."""
        from vitkit.pictures.video import is_video, open_video

        for number, (path, name) in enumerate(zip(self.files, self.names, strict=True)):
            if not is_video(path):
                image = _read(path)
                result = self.engine(image)
                if self.out is not None:
                    _save(self.picture.draw(image, result), self.out / f"{name}{self.suffix}")
                yield _Prediction(path, None, _image_id(name, number), result)
                continue
            with open_video(path) as video, self._video_writer(name, video.fps / self.every) as append:
                for frame, image in video.frames(self.every):
                    result = self.engine(image)
                    append(image, result)
                    image_id = f"{_image_id(name, number, text=True)}_{frame:06d}"
                    yield _Prediction(path, frame, image_id, result)

    @contextmanager
    def _video_writer(self, name: str, fps: float) -> Iterator[Callable[[NDArray[np.uint8], Any], None]]:
        """A function that adds the picture of a frame to NAME.mp4; it does nothing without `out`."""
        from vitkit.pictures.video import write_video

        if self.out is None:
            yield lambda image, result: None
            return
        options = self.picture.VIDEO_OPTIONS
        with write_video(self.out / f"{name}.mp4", fps) as append:
            yield lambda image, result: append(self.picture.draw(image, result, **options))

    def row(self, one: _Prediction) -> dict[str, Any]:
        """A result as plain numbers and texts, for JSON."""
        frame = {} if one.frame is None else {"frame": one.frame}
        return {"image": str(one.path), **frame, **self.picture.to_json(one.result)}

    def line(self, one: _Prediction) -> str:
        """`photo.jpg: 3 person, 1 car, sky, road`."""
        frame = "" if one.frame is None else f" frame {one.frame}"
        return f"{one.path}{frame}: {self.picture.describe(one.result)}"


def _print_as_they_come(job: _Job, json: bool) -> list[dict[str, Any]]:
    """Print each result, or collect them for JSON."""
    rows = []
    for one in job.results():
        if json:
            rows.append(job.row(one))
        else:
            typer.echo(job.line(one))
    return rows


def _write(job: _Job, out: Path, json: bool) -> list[dict[str, Any]]:
    """Write pictures, and predictions if the task has a file format for them; then print the results."""
    # Only tasks with a common format of predictions have this function.
    save = getattr(job.metric, "save_predictions", None)
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    total = job.count()
    with progress_bar("predicting") as progress:

        def results() -> Iterator[tuple[int | str, Any]]:
            for done, one in enumerate(job.results(), start=1):
                if json:
                    rows.append(job.row(one))
                elif one.frame is None:
                    # Printed at the end: here the progress bar would be in between.
                    lines.append(job.line(one))
                yield one.image_id, one.result
                progress(done, max(done, total))

        if save is None:
            deque(results(), maxlen=0)
        else:
            save(out / "predictions.json", job.engine.card, results())
    what = "pictures" if job.suffix == ".png" else f"{job.suffix} files"
    say(f"{len(job.names)} {what}{'' if save is None else ' and predictions.json'} in {out}")
    for line in lines:
        typer.echo(line)
    return rows


def _read(path: Path) -> NDArray[np.uint8]:
    from vitkit.runtimes.image import check_image, read_image

    return check_image(read_image(path), str(path))


def _image_id(name: str, number: int, text: bool = False) -> int | str:
    """COCO's own number if the file is named by it, so that its truth is found; else the name itself."""
    from urllib.parse import quote

    if not text and re.fullmatch("[0-9]{12}", name):
        return int(name)
    # The PNG is named by the id, and the file system bounds that.
    return name if name.isprintable() and len(quote(name, safe="")) <= 200 else f"image {number}"


def _output_names(files: Iterable[Path]) -> list[str]:
    """A name for each file: its own without the suffix, numbered if two are the same."""
    names: dict[str, None] = {}
    used: Counter[str] = Counter()
    for path in files:
        name = path.stem
        while name in names:
            used[path.stem] += 1
            name = f"{path.stem}-{used[path.stem] + 1}"
        names[name] = None
    return list(names)


def _save(picture: Image.Image, path: Path) -> None:
    from vitkit.runtimes.errors import BadRequest

    try:
        picture.save(path)
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error}") from None


def _check_pictures(out: Path, names: list[str], images: list[Path]) -> None:
    """Make the folder for pictures; raises BadRequest if that fails or a picture would replace an input."""
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.files import check_writable

    try:
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out)
        read = {path.resolve() for path in images}
        for name in names:
            if (out / name).resolve() in read or (out / name).is_dir():
                raise BadRequest(f"{out / name} is in the way of a picture; name another folder")
    except OSError as error:
        raise BadRequest(f"the pictures cannot be written to {out}: {error}") from None
