"""Commands that make and check data sets: data shapes, data check, data convert, data shards, data index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_json, progress_bar, say

if TYPE_CHECKING:
    from vitkit.data.tars import ShardIndex

data = typer.Typer(help="Make and check data sets.", no_args_is_help=True)

# What a set has unless asked otherwise, by task.
_SIZES = {
    "classification": {"train": 4000, "val": 1000, "size": 64},
    "panoptic": {"train": 1000, "val": 100, "size": 129},
}


@data.command()
def shapes(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    task: Annotated[
        str,
        typer.Option(
            help="classification: train/CLASS/..., val/CLASS/...; panoptic: COCO's panoptic layout."
        ),
    ] = "classification",
    train: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Training images (classification: 4000, panoptic: 1000)."),
    ] = None,
    val: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Validation images (classification: 1000, panoptic: 100)."),
    ] = None,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side of the square images, in pixels (classification: 64, panoptic: 129)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same bytes.")] = 0,
) -> None:
    """Generate a data set: one shape on a cluttered background, or scenes of shapes for panoptic models."""
    from vitkit.data.scenes import write_scenes
    from vitkit.data.shapes import write_shapes
    from vitkit.runtimes.errors import BadRequest

    writers = {"classification": write_shapes, "panoptic": write_scenes}
    if task not in writers:
        raise BadRequest(f"there is no task {task!r}; known are {', '.join(writers)}")
    given = {"train": train, "val": val, "size": size}
    sizes = _SIZES[task] | {name: value for name, value in given.items() if value is not None}
    with progress_bar("drawing") as progress:
        writers[task](out, **sizes, seed=seed, progress=progress)
    say(f"{out}: {sizes['train']} training and {sizes['val']} validation images")


@data.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Data set in COCO's panoptic layout.", metavar="DIR")],
    json: JsonFlag = False,
) -> None:
    """Look for every inconsistency in a panoptic data set.

    Exit code 2 if there is one; each is on a line, with the file it is in.
    """
    from vitkit.data.coco.check import check_panoptic
    from vitkit.data.coco.read import find_splits, read_split

    with progress_bar("checking") as progress:
        problems = check_panoptic(folder, progress)
    if json:
        rows = [{"file": str(problem.file), "message": problem.message} for problem in problems]
        print_json({"problems": rows})
    else:
        for problem in problems:
            typer.echo(str(problem))
    if problems:
        say(f"{folder}: {len(problems)} problems")
        raise typer.Exit(2)
    sets = [read_split(folder, split) for split in find_splits(folder)]
    images = [image for found in sets for image in found.images]
    segments = [segment for image in images for segment in image.segments]
    say(
        f"{folder}: no problem in {len(images)} images with {len(segments)} segments "
        f"of {len(sets[0].categories)} categories"
    )
    if sparse := sum(segment.area is None or segment.box is None for segment in segments):
        say(
            f"{sparse} segments have no 'area' or 'bbox' in the JSON; vitkit needs neither: both follow "
            "from the PNGs, but some other tools refuse such data"
        )


@data.command()
def convert(
    layout: Annotated[str, typer.Argument(help="What SRC is: cityscapes or ade20k.", metavar="LAYOUT")],
    source: Annotated[Path, typer.Argument(help="The data set as downloaded.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
) -> None:
    """Convert Cityscapes or ADE20K to COCO's panoptic layout; images are linked, not copied."""
    from vitkit.data.convert import CONVERTERS
    from vitkit.runtimes.errors import BadRequest

    if layout not in CONVERTERS:
        raise BadRequest(f"{layout!r} cannot be converted; known are {', '.join(CONVERTERS)}")
    with progress_bar("converting") as progress:
        CONVERTERS[layout](source, out, progress)
    say(f"{out}: COCO's panoptic layout; check it with: vitkit data check {out}")


@data.command()
def shards(
    source: Annotated[Path, typer.Argument(help="Folder with train/CLASS and val/CLASS.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
    per_shard: Annotated[int, typer.Option("--per-shard", help="Images of a tar file.")] = 1000,
) -> None:
    """Pack image folders into tar files (webdataset's layout) with an index, for disks or web servers.

    Train with --data OUT, or with --data URL once they are on a server.
    """
    from vitkit.data.pack import write_shards

    with progress_bar("packing") as progress:
        index = write_shards(source, out, per_shard, progress)
    _say_shards(out, index)


@data.command()
def index(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder with train*.tar and val*.tar; images and their .cls.", metavar="DIR"),
    ],
    classes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--classes", help="Text file with the name of class 0 on its first line, of class 1 on the next."
        ),
    ] = None,
) -> None:
    """Write the index of tar files that other tools made in webdataset's layout."""
    from vitkit.data.pack import index_shards
    from vitkit.runtimes.errors import BadInput
    from vitkit.runtimes.reading import read_text

    names: list[str] = []
    if classes is not None:
        try:
            names = read_text(classes).split("\n")
        except (OSError, ValueError) as error:
            raise BadInput(f"{classes} cannot be read as text: {error}") from None
    _say_shards(folder, index_shards(folder, [name.strip() for name in names if name.strip()]))


def _say_shards(folder: Path, index: ShardIndex) -> None:
    counts = [
        f"{sum(shard.samples for shard in shards)} {split} images in {len(shards)} tar files"
        for split, shards in index.splits.items()
    ]
    say(f"{folder}: {', '.join(counts)}, {len(index.classes)} classes")
