"""Commands that make and check data sets: data shapes, data check, data convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from vitkit.cli import app
from vitkit.cli.make import JsonFlag
from vitkit.cli.show import print_json, progress_bar, say

data = typer.Typer(help="Make and check data sets.", no_args_is_help=True)
app.add_typer(data, name="data")

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

    Exit code 2 where there is one; each stands on a line, with the file it is in.
    """
    from vitkit.data.panoptic import check_panoptic, find_splits, read_split

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
    segments = sum(len(image.segments) for found in sets for image in found.images)
    say(
        f"{folder}: no problem in {sum(len(found.images) for found in sets)} images with {segments} segments "
        f"of {len(sets[0].categories)} categories"
    )


@data.command()
def convert(
    layout: Annotated[str, typer.Argument(help="What SRC is: cityscapes or ade20k.", metavar="LAYOUT")],
    source: Annotated[Path, typer.Argument(help="The data set as downloaded.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
) -> None:
    """Convert Cityscapes or ADE20K to COCO's panoptic layout; photographs are linked, not copied."""
    from vitkit.data.convert import CONVERTERS
    from vitkit.runtimes.errors import BadRequest

    if layout not in CONVERTERS:
        raise BadRequest(f"{layout!r} cannot be converted; known are {', '.join(CONVERTERS)}")
    with progress_bar("converting") as progress:
        CONVERTERS[layout](source, out, progress)
    say(f"{out}: COCO's panoptic layout; look it over with: vitkit data check {out}")
