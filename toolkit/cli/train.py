"""`vitkit train`: a model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from vitkit.cli.show import is_quiet, key_values, say


def train(
    recipe: Annotated[str, typer.Argument(help="Recipe to train by (see: vitkit recipes).")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Folder with train/CLASS and val/CLASS, or COCO's panoptic layout; folder or URL of shards.",
        ),
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Run folder to write, which must not exist (runs/RECIPE)."),
    ] = None,
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
    from vitkit.train import override, recipe_named
    from vitkit.train import train as run_training

    changes = key_values(set or [], "--set")
    if epochs is not None:
        changes["epochs"] = str(epochs)
    config = override(recipe_named(recipe), changes)
    if out is None:
        out = Path("runs") / recipe
        say(f"the run goes to {out}")
    run_training(
        config, data, out, resume=resume, progress=not is_quiet(), init=init, backbone=backbone_weights
    )
