"""Commands that train and show the way: train, recipes, demo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from vitkit.cli import app
from vitkit.cli.make import JsonFlag
from vitkit.cli.show import key_values, print_json, say


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe to train by (see: vitkit recipes).")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Folder with train/CLASS and val/CLASS, or COCO's panoptic layout; folder or URL of shards.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")],
    epochs: Annotated[Optional[int], typer.Option(help="Epochs instead of the recipe's.")] = None,  # noqa: UP045
    set: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="Change a value of the recipe, as key=value; may repeat."),
    ] = None,
    init: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--init", help="Start from this run's weights (or its model.safetensors)."),
    ] = None,
    backbone_weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--backbone-weights",
            help="ImageNet weights of a panoptic backbone: a file (timm, torchvision), or 'timm': download.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
) -> None:
    """Train a model by a recipe; every epoch leaves a checkpoint from which --resume goes on.

    Classifiers take image folders; panoptic models COCO's layout: annotations/panoptic_train*.json with PNGs
    and train*/, and the same for val* (without one, PQ is that of the training images).
    """
    _share_the_machine()
    from vitkit.train import override, recipe_named
    from vitkit.train import train as run_training

    changes = key_values(set or [], "--set")
    if epochs is not None:
        changes["epochs"] = str(epochs)
    config = override(recipe_named(recipe), changes)
    run_training(config, data, out, resume=resume, init=init, backbone=backbone_weights)


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
            sources = values.pop("sources")
            for key, value in values.items():
                typer.echo(f"{key} = {value}" + (f"  # {sources[key]}" if key in sources else ""))
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

    Leaves report.md with a table and pictures, and report.html, which compares the engines. About a quarter
    of an hour on two CPU cores. A finished training in OUT is used again.
    """
    _share_the_machine()
    from vitkit.demo import run_demo

    report = run_demo(out, quick=quick)
    say(f"the report is {report}")
