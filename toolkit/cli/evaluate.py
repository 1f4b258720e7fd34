"""`vitkit evaluate`: accuracy on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vitkit.cli.arguments import JsonFlag, Threads
from vitkit.cli.show import print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from vitkit.evaluate import Network
    from vitkit.evaluate.panoptic_quality import QualityReport


def evaluate(
    data: Annotated[
        Path, typer.Option("--data", help="Labelled folder: DIR/CLASS/**/image, or COCO's panoptic layout.")
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
        typer.Option("--split", help="Panoptic: the split to measure on (val*, or the only one)."),
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
    n01440764), its labels, or plain class numbers. Panoptic segmentation: PQ, SQ and RQ as COCO defines
    them, and the mean IoU, at the size of the photographs.
    """
    from vitkit.evaluate import open_network
    from vitkit.runtimes.errors import BadRequest

    if (network is None) == (predictions is None):
        raise BadRequest("name either a network or --predictions FILE.json")
    if predictions is not None:
        if fast or save or threads:
            raise BadRequest("--fast, --save and --threads are for networks, not for --predictions")
        _evaluate_predictions(predictions, data, split, json)
    elif network is not None:
        opened = open_network(network, threads)
        if opened.card.task == "panoptic":
            _evaluate_panoptic(opened, network, data, split, fast, save, json)
        elif split or fast or save:
            raise BadRequest(f"--split, --fast and --save are for panoptic networks; {network} is none")
        else:
            _evaluate_classification(opened, network, data, json)
        opened.close()


def _evaluate_classification(network: Network, path: Path, data: Path, json: bool) -> None:
    from vitkit.evaluate.accuracy import evaluate
    from vitkit.evaluate.results import to_json

    with progress_bar("classifying") as progress:
        accuracy = evaluate(network, data, progress)
    if json:
        print_json(to_json(path, network.card, str(data), accuracy))
    else:
        kind = f"{network.card.name}, {network.card.target} {network.card.precision}"
        typer.echo(
            f"{kind}: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} % of {accuracy.images} images"
        )


def _evaluate_panoptic(
    network: Network,
    path: Path,
    data: Path,
    split: str | None,
    fast: bool,
    save: Path | None,
    json: bool,
) -> None:
    from vitkit.data.coco.read import read_split
    from vitkit.data.coco.write import check_predictions_path
    from vitkit.evaluate.panoptic import evaluate
    from vitkit.evaluate.results import to_json

    if save is not None:
        check_predictions_path(save)
    truth = read_split(data, split)
    with progress_bar("segmenting") as progress:
        report = evaluate(network, truth, fast=fast, progress=progress, save=save)
    if json:
        print_json(to_json(path, network.card, str(truth.source), report, fast=fast))
    else:
        kind = f"{network.card.name}, {network.card.target} {network.card.precision}"
        _print_quality(report, f"{kind}{' (fast)' if fast else ''}")
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
        _print_quality(report, str(predictions))


def _print_quality(report: QualityReport, title: str) -> None:
    parts = {"all": report.all, "things": report.things, "stuff": report.stuff}
    # Of equal width, so that the points stand below each other.
    rows = [
        (name, *(f"{value:6.2f}" for value in (part.pq, part.sq, part.rq)), part.categories)
        for name, part in parts.items()
    ]
    print_table(("", "PQ", "SQ", "RQ", "categories"), rows, title=f"{title}: {report.images} images")
    typer.echo(f"mIoU {report.miou:.2f} %")
