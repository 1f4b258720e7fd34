"""`vitkit evaluate`: accuracy on labelled images."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vitkit.cli.arguments import JsonFlag, Threads
from vitkit.cli.show import print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from vitkit.evaluate.results import Table


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="DIR/CLASS/**/image; COCO's panoptic layout; DIR/images/NAME.jpg with DIR/labels/NAME.png.",
        ),
    ],
    network: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Run folder (torch) or artifact folder (its engine)."),
    ] = None,
    predictions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--predictions", help="Instead of a network: JSON of COCO's panoptic format."),
    ] = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--split", help="COCO's layout: the split to measure on (val*, or the only one)."),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Panoptic: decode in the fast mode.")] = False,
    save: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--save", help="Panoptic: write the predictions, FILE.json and the folder FILE/."),
    ] = None,
    threads: Threads = None,
    json: JsonFlag = False,
) -> None:
    """Measure the accuracy of a network, on the engine itself, or of predictions that any tool made.

    Classification: top-1 and top-5; folders are matched with the card's label ids (such as ImageNet's
    n01440764) or its labels, or, if none of these is a number, with class numbers from 0. Panoptic
    segmentation: PQ, SQ and RQ as COCO defines them, and the mean IoU, at the size of the images. Semantic
    segmentation: mean IoU at the size of the images, with DIR/labels/NAME.png as the class index of every
    pixel of DIR/images/NAME.jpg, 255 ignored, or with a panoptic set as the truth.
    """
    from vitkit.evaluate import evaluate, open_network
    from vitkit.evaluate.results import to_json
    from vitkit.runtimes.errors import BadRequest

    if (network is None) == (predictions is None):
        raise BadRequest("name either a network or --predictions FILE.json")
    if predictions is not None:
        if fast or save or threads:
            raise BadRequest("--fast, --save and --threads are for networks, not for --predictions")
        _evaluate_predictions(predictions, data, split, json)
    elif network is not None:
        given = {"split": split, "fast": fast or None, "save": save}
        options = {name: value for name, value in given.items() if value is not None}
        opened = open_network(network, threads)
        with closing(opened), progress_bar("evaluating") as progress:
            result = evaluate(opened, data, progress, **options)
        card = opened.card
        if json:
            print_json(to_json(network, card, result))
        else:
            _print(result.shown(f"{card.name}, {card.target} {card.precision}"))
        if save is not None:
            say(f"predictions: {save}")


def _evaluate_predictions(predictions: Path, data: Path, split: str | None, json: bool) -> None:
    from vitkit.data.coco.read import read_split
    from vitkit.evaluate.panoptic_quality import evaluate_predictions

    truth = read_split(data, split)
    with progress_bar("comparing") as progress:
        report = evaluate_predictions(truth, predictions, progress)
    if json:
        print_json({"predictions": str(predictions), **report.summary()})
    else:
        _print(report.shown(str(predictions)))


def _print(parts: list[str | Table]) -> None:
    for part in parts:
        if isinstance(part, str):
            typer.echo(part)
        else:
            print_table(*part)
