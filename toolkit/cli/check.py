"""Commands that check and measure: verify, evaluate, bench, report, inspect, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vitkit.cli import app
from vitkit.cli.device import DevicesFile
from vitkit.cli.make import JsonFlag, print_checks
from vitkit.cli.show import print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from vitkit.devices.registry import Device
    from vitkit.evaluate import Network
    from vitkit.panoptic_quality import QualityReport

ArtifactArgument = Annotated[Path, typer.Argument(help="Artifact folder, as vitkit export writes it.")]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", help="CPU threads of one run (the vendor's choice)."),
]


@app.command()
def verify(
    artifact: ArtifactArgument,
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--against", help="The run (or a float artifact) that the engine must agree with."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Photographs to compare on; needs --against."),
    ] = None,
    count: Annotated[int, typer.Option(help="How many of them, spread over the folder.")] = 256,
    json: JsonFlag = False,
) -> None:
    """Check an engine: its golden pairs, and real images against the float model.

    Tensor error, mean cosine and top-1 agreement are held against limits per precision. A flip between
    two classes that the float model itself puts within one point of probability counts as a tie. Of panoptic
    engines, segments are compared by PQ, and k-means assignments stage by stage. Exit code 1 when the
    engine is broken.
    """
    from vitkit.evaluate import open_network
    from vitkit.exporters import STAGE_PHOTOS, check_stages
    from vitkit.exporters.parity import check_golden, check_photos, check_reference
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.image import generated_photos, sample_photos

    if count < 1:
        raise BadRequest(f"--count is {count}; it must be at least 1")
    if images and not against:
        raise BadRequest("--images needs the float model to compare with: add --against RUN")
    with open_engine(artifact) as engine:
        checks = [check_golden(engine)]
        if against:
            reference = open_network(against)
            check_reference(engine.card, reference.card)
            photos = (
                sample_photos(images, count)
                if images
                else [(f"generated {i}", photo) for i, photo in enumerate(generated_photos(16, seed=1))]
            )
            stages = check_stages(engine, reference, [photo for _, photo in photos[:STAGE_PHOTOS]])
            checks.append(check_photos(engine, reference.predict, reference.card.image, photos, stages))
            reference.close()
    broken = any(check.problems for check in checks)
    if json:
        body = {"ok": not broken, "artifact": str(artifact), "settings": engine.session.settings}
        print_json({**body, "checks": [check.summary() for check in checks]})
    else:
        print_checks(checks)
    if broken:
        say(f"{artifact} does not do what the float model does")
        raise typer.Exit(1)


@app.command()
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
    from vitkit.evaluate import evaluate, to_json

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
    from vitkit.data.panoptic import check_predictions_path, read_split
    from vitkit.evaluate import evaluate_panoptic, to_json

    if save is not None:
        check_predictions_path(save)
    truth = read_split(data, split)
    with progress_bar("segmenting") as progress:
        report = evaluate_panoptic(network, truth, fast=fast, progress=progress, save=save)
    if json:
        print_json(to_json(path, network.card, str(truth.source), report, fast=fast))
    else:
        kind = f"{network.card.name}, {network.card.target} {network.card.precision}"
        _print_quality(report, f"{kind}{' (fast)' if fast else ''}")
    if save is not None:
        say(f"predictions: {save}")


def _evaluate_predictions(predictions: Path, data: Path, split: str | None, json: bool) -> None:
    from vitkit.data.panoptic import read_split
    from vitkit.panoptic_quality import evaluate_predictions

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


@app.command()
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifact folders; several are interleaved.")],
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--device",
            help="cpu, what the vendor has here, or NAME or NAME:gpu of vitkit device list "
            "(cpu, and cuda for TensorRT).",
        ),
    ] = None,
    devices: DevicesFile = None,
    threads: Threads = None,
    duration: Annotated[float, typer.Option(help="Seconds recorded for each artifact and scope.")] = 10.0,
    batch: Annotated[int, typer.Option(help="Images a query, for engines with a free batch size.")] = 1,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Photographs to draw inputs from (generated ones)."),
    ] = None,
    pool_size: Annotated[int, typer.Option(help="How many different images to draw from.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    scope: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="engine: feeds in, outputs out. image: frame in, decoded result out. Both by default."
        ),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Scope image of panoptic engines with the fast decode.")
    ] = False,
    fps_target: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--fps-target", help="Say whether it keeps up with so many frames a second at p99."),
    ] = None,
    max_isa: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--max-isa", help="OpenVINO as on a lesser CPU: avx2, avx2_vnni or avx512_vnni; an emulation."
        ),
    ] = None,
    cool_down: Annotated[
        float, typer.Option(help="Of phones: seconds of rest before each of five tries.")
    ] = 300.0,
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="Save the reports with all raw times to this file."),
    ] = None,
) -> None:
    """Measure latency and images per second, single stream, after warm-up; nothing is clipped.

    Several artifacts are measured in turns in one process and compared as ratios to the first. A
    percentile that the number of samples cannot support is not printed.
    """
    from rich.console import Console

    from vitkit import bench as benchmark
    from vitkit.devices import measure
    from vitkit.devices.registry import default_file, find_device
    from vitkit.frames import check_fps, sentence
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.files import check_writable

    if fps_target is not None:
        check_fps(fps_target)
    if json:
        check_writable(json)
    options = {
        "device": device,
        "threads": threads,
        "batch": batch,
        "duration": duration,
        "images": images,
        "pool_size": pool_size,
        "seed": seed,
        "scopes": scope or ("engine", "image"),
        "decode": {"fast": True} if fast else None,
    }
    phone = find_device(device.partition(":")[0], devices or default_file()) if device else None
    if phone and phone.kind == "adb":
        refused = {"--fps-target": fps_target, "--max-isa": max_isa, "--images": images, "--scope": scope}
        if given := [flag for flag, value in {**refused, "--fast": fast}.items() if value]:
            raise BadRequest(
                f"{given[0]} is not for phones: benchmark_model keeps no raw times and decodes nothing"
            )
        _bench_phone(phone, artifacts, options, cool_down, json)
        return
    with progress_bar("measuring") as progress:
        reports = measure(
            artifacts,
            options,
            devices=devices,
            max_isa=max_isa,
            progress=lambda text, fraction: progress(round(100 * fraction), 100),
        )
    for table in benchmark.tables(reports):
        Console().print(table)
    if fps_target is not None:
        for report in reports:
            typer.echo(sentence(report, fps_target))
    for note in benchmark.notes(reports):
        typer.echo(note)
    if json:
        benchmark.save(reports, json)
        say(f"raw times: {json}")


def _bench_phone(
    phone: Device, artifacts: list[Path], options: dict[str, Any], cool_down: float, json: Path | None
) -> None:
    from vitkit.devices import android

    reports = []
    with progress_bar("measuring") as progress:
        for artifact in artifacts:
            report = android.bench_on_phone(
                phone,
                artifact,
                threads=options["threads"],
                duration=options["duration"],
                cool_down=cool_down,
                progress=lambda text, fraction: progress(round(100 * fraction), 100),
            )
            reports.append(report)
    for report in reports:
        print_table((report.artifact, ""), android.rows(report))
        if report.invalid:
            typer.echo(f"INVALID: {report.artifact}: {report.invalid}.")
    if json:
        android.save(reports, json)
        say(f"reports: {json}")


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Files of vitkit bench --json FILE and vitkit evaluate --json > FILE."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write, such as report.html.")],
) -> None:
    """Write one self-contained page that compares measured artifacts and devices.

    Latency of every query, accuracy against latency, size, environment, and what is an estimate. Results of
    one artifact are joined by the hashes of its files. The page needs no network and prints well.
    """
    from vitkit.report import write_report

    say(f"the page is {write_report(results, out)}")


@app.command()
def inspect(artifact: ArtifactArgument, json: JsonFlag = False) -> None:
    """Show an artifact: card, file sizes, operators by precision."""
    from vitkit.inspection import inspect

    body = inspect(artifact)
    if json:
        print_json(body)
        return
    shown = {key: value for key, value in body.items() if key not in ("files", "operators", "provenance")}
    print_table(
        ("field", "value"), [(key, _text(value)) for key, value in shown.items()], title=str(artifact)
    )
    provenance = body["provenance"].items()
    print_table(("made from", ""), [(key, _text(value)) for key, value in provenance])
    print_table(("file", "bytes"), list(body["files"].items()))
    rows = [
        (precision, sum(counts.values()), ", ".join(f"{name} {n}" for name, n in counts.items()))
        for precision, counts in body["operators"].items()
    ]
    print_table(("precision", "operators", "which"), rows)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@app.command()
def doctor(json: JsonFlag = False) -> None:
    """Say which targets work here, with which versions and CPU features, and what mends the rest."""
    from rich.console import Console

    from vitkit import doctor as diagnosis

    checks = diagnosis.diagnose()
    if json:
        print_json(diagnosis.to_json(checks))
    else:
        Console().print(diagnosis.table(checks))
