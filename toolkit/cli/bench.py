"""`vitkit bench`: latency and images per second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from vitkit.cli.arguments import DevicesFile, EngineDevice, RequireDevice, Threads
from vitkit.cli.show import print_table, say, step_bar

if TYPE_CHECKING:
    from vitkit.bench import BenchOptions, BenchReport
    from vitkit.devices.registry import Device

# By the flag, the field of `BenchOptions` that no phone's tool takes.
_UNUSED_BY_PHONES = {
    "--device NAME:DEVICE": "device",
    "--require-device": "require_device",
    "--batch": "batch",
    "--images": "images",
    "--pool-size": "pool_size",
    "--seed": "seed",
    "--scope": "scopes",
    "--fast": "decode",
    "--max-isa": "max_isa",
}


def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifact folders; several are interleaved.")],
    device: EngineDevice = None,
    devices: DevicesFile = None,
    require_device: RequireDevice = False,
    threads: Threads = None,
    duration: Annotated[float, typer.Option(help="Seconds recorded for each artifact and scope.")] = 10.0,
    batch: Annotated[int, typer.Option(help="Images in each query, for engines with a free batch size.")] = 1,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Folder of images to draw inputs from (generated images)."),
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
        typer.Option("--fps-target", help="Answer whether it keeps up with this frame rate at p99."),
    ] = None,
    max_isa: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--max-isa", help="OpenVINO as on a lesser CPU: avx2, avx2_vnni or avx512_vnni; an emulation."
        ),
    ] = None,
    cool_down: Annotated[
        float, typer.Option(help="Seconds of rest before each of the five tries on a phone.")
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
    from vitkit.bench import SCOPES, BenchOptions, save
    from vitkit.bench.frame_rate import check_fps
    from vitkit.devices.measure import measure
    from vitkit.devices.registry import find_machine
    from vitkit.runtimes.files import check_writable

    if fps_target is not None:
        check_fps(fps_target)
    if json:
        check_writable(json)
    machine, engine_device = find_machine(device, devices)
    options = BenchOptions(
        device=engine_device,
        require_device=require_device,
        threads=threads,
        batch=batch,
        duration=duration,
        images=images,
        pool_size=pool_size,
        seed=seed,
        scopes=tuple(scope or SCOPES),
        decode={"fast": True} if fast else None,
        max_isa=max_isa,
        cool_down=cool_down,
    )
    if machine and machine.kind == "adb":
        if fps_target is not None:
            _refuse_for_phones("--fps-target")
        _bench_phone(machine, artifacts, options, json)
        return
    with step_bar() as progress:
        reports = measure(artifacts, options, machine, progress=progress)
    _print_reports(reports, fps_target)
    if json:
        save(reports, json)
        say(f"raw times: {json}")


def _print_reports(reports: list[BenchReport], fps_target: float | None) -> None:
    from rich.console import Console

    from vitkit.bench import notes, to_tables
    from vitkit.bench.frame_rate import describe

    for table in to_tables(reports):
        Console().print(table)
    if fps_target is not None:
        for report in reports:
            typer.echo(describe(report, fps_target))
    for note in notes(reports):
        typer.echo(note)


def _refuse_for_phones(flag: str) -> NoReturn:
    from vitkit.runtimes.errors import BadRequest

    raise BadRequest(f"{flag} is not for phones: benchmark_model keeps no raw times and decodes nothing")


def _bench_phone(phone: Device, artifacts: list[Path], options: BenchOptions, json: Path | None) -> None:
    from vitkit.bench import BenchOptions
    from vitkit.devices import android

    for flag, name in _UNUSED_BY_PHONES.items():
        if getattr(options, name) != getattr(BenchOptions, name):
            _refuse_for_phones(flag)
    reports = []
    with step_bar() as progress:
        for i, artifact in enumerate(artifacts):

            def show(text: str, share: float, i: int = i) -> None:
                progress(text, (i + share) / len(artifacts))

            found = android.bench_on_phone(phone, artifact, options, progress=show)
            reports.append(found)
    for report in reports:
        print_table((report.artifact, ""), android.rows(report))
        if report.invalid:
            typer.echo(f"INVALID: {report.artifact}: {report.invalid}.")
    if json:
        android.save(reports, json)
        say(f"reports: {json}")
