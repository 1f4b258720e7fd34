"""`vitkit bench`: latency and images per second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vitkit.cli.arguments import DevicesFile, Threads
from vitkit.cli.show import print_table, progress_bar, say

if TYPE_CHECKING:
    from vitkit.devices.registry import Device


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
    from vitkit.bench.frame_rate import check_fps, sentence
    from vitkit.devices import measure
    from vitkit.devices.registry import default_file, find_device
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
