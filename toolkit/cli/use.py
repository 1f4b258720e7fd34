"""Commands that use networks and data: predict, train, recipes, demo."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from vitkit.cli import app
from vitkit.cli.make import JsonFlag
from vitkit.cli.show import key_values, print_json, say


@app.command()
def predict(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, as vitkit export writes it.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Folder for the pictures with results drawn on them."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Classify images with an engine, and draw the results.

    For PS-ViT an arrow goes from each sampling point's first position to its last.
    """
    from vitkit.draw import draw_classification
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.image import read_image

    photos = [read_image(path) for path in images]
    names = _file_names(images)
    with open_engine(artifact) as engine:
        if out is not None:
            _check_pictures(out, names, images)
        results = engine(photos)
    if out is not None:
        for name, photo, result in zip(names, photos, results, strict=True):
            draw_classification(photo, result).save(out / name)
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


def _file_names(images: list[Path]) -> list[str]:
    """A PNG name for each image, numbered where two images share theirs."""
    names: list[str] = []
    for path in images:
        numbered = (f"{path.stem}-{i}.png" for i in itertools.count(2))
        names.append(next(n for n in itertools.chain([f"{path.stem}.png"], numbered) if n not in names))
    return names


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


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe to train by (see: vitkit recipes).")],
    data: Annotated[Path, typer.Option("--data", help="Folder with train/CLASS/... and val/CLASS/...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")],
    epochs: Annotated[Optional[int], typer.Option(help="Epochs instead of the recipe's.")] = None,  # noqa: UP045
    set: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="Change a value of the recipe, as key=value; may repeat."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
) -> None:
    """Train a model by a recipe; every epoch leaves a checkpoint from which --resume goes on."""
    _share_the_machine()
    from vitkit.train import override, recipe_named
    from vitkit.train import train as run_training

    changes = key_values(set or [], "--set")
    if epochs is not None:
        changes["epochs"] = str(epochs)
    run_training(override(recipe_named(recipe), changes), data, out, resume=resume)


def _share_the_machine() -> None:
    """Let torch's idle threads spin less: beside another busy process that slows training many times.

    OpenMP reads this once, when torch is imported.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


@app.command()
def recipes(
    name: Annotated[Optional[str], typer.Argument(help="Show this recipe's values.")] = None,  # noqa: UP045
    json: JsonFlag = False,
) -> None:
    """List the training recipes, or the values of one."""
    from dataclasses import asdict

    from vitkit.train import RECIPES, recipe_named

    if name is not None:
        values = asdict(recipe_named(name))
        if json:
            print_json(values)
        else:
            typer.echo("\n".join(f"{key} = {value}" for key, value in values.items()))
        return
    lines = {key: (recipe.__doc__ or "").split("\n")[0] for key, recipe in RECIPES.items()}
    if json:
        print_json(lines)
    else:
        typer.echo("\n".join(f"{key}: {text}" for key, text in lines.items()))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for data, run, engines, report and pictures.")] = Path(
        "demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A small fraction of the data and training: shows the way only.")
    ] = False,
) -> None:
    """Walk the whole way on generated data: train, export, calibrate, verify, evaluate, measure, draw.

    Leaves report.md with a table and pictures. About five minutes on two CPU cores. A finished training in
    OUT is used again.
    """
    _share_the_machine()
    from vitkit.demo import run_demo

    report = run_demo(out, quick=quick)
    say(f"the report is {report}")
