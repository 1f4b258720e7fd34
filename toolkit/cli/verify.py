"""`vitkit verify`: an engine against the float model, here or on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vitkit.cli.arguments import ArtifactArgument, DevicesFile, EngineDevice, JsonFlag
from vitkit.cli.show import print_checks, print_json, print_table, say, step_bar

if TYPE_CHECKING:
    from vitkit.devices.registry import Device
    from vitkit.devices.verify import DeviceParity
    from vitkit.evaluate import Network
    from vitkit.exporters.parity import NamedImage


def verify(
    artifact: ArtifactArgument,
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--against", help="The run (or a float artifact) that the engine must agree with."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Images to compare on; needs --against or a machine."),
    ] = None,
    count: Annotated[int, typer.Option(help="How many of them, spread over the folder.")] = 256,
    device: EngineDevice = None,
    devices: DevicesFile = None,
    json: JsonFlag = False,
) -> None:
    """Check an engine: its golden pairs, and real images against the float model.

    Tensor error, mean cosine and top-1 agreement are held against limits per precision. A flip between
    classes that the float model itself puts within one point of probability is a near tie: a bounded share
    of the images may have one. Of panoptic engines, segments are compared by PQ, and k-means assignments
    one by one; of semantic ones the class of every pixel; of raw tensors every output by itself. Exit code 1
    when the engine is broken.

    With --device NAME the engine runs on that machine too, and its outputs are compared here: with the float
    model, and with those of the same engine here.
    """
    from vitkit.devices.registry import find_machine
    from vitkit.evaluate import open_network
    from vitkit.exporters.parity import check_reference
    from vitkit.runtimes.card import read_artifact
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.image import generated_photos, sample_photos

    if count < 1:
        raise BadRequest(f"--count is {count}; it must be at least 1")
    machine, engine_device = find_machine(device, devices)
    if images and not (against or machine):
        raise BadRequest("--images needs the float model to compare with: add --against RUN")
    card = read_artifact(artifact).card
    reference = open_network(against) if against else None
    if reference:
        check_reference(card, reference.card)
    compared = (
        sample_photos(images, count)
        if images
        else [(f"generated {i}", image) for i, image in enumerate(generated_photos(16, seed=1))]
    )
    if machine is None:
        broken = _verify_here(artifact, reference, compared, engine_device, json)
    else:
        broken = _verify_on(machine, artifact, reference, compared, images, engine_device, json)
    if reference:
        reference.close()
    if broken:
        say(f"{artifact} does not do what the float model does{f' on {machine.name}' if machine else ''}")
        raise typer.Exit(1)


def _verify_here(
    artifact: Path,
    reference: Network | None,
    images: list[NamedImage],
    device: str | None,
    json: bool,
) -> bool:
    """Whether the engine is broken, which is printed."""
    from vitkit.exporters import run_checks
    from vitkit.runtimes.engine import open_engine

    with open_engine(artifact, device=device) as engine:
        checks = run_checks(engine, reference, images)
    broken = any(check.problems for check in checks)
    if json:
        body = {"ok": not broken, "artifact": str(artifact), "settings": engine.session.settings}
        print_json({**body, "checks": [check.summary() for check in checks]})
    else:
        print_checks(checks)
    return broken


def _verify_on(
    machine: Device,
    artifact: Path,
    reference: Network | None,
    images: list[NamedImage],
    folder: Path | None,
    engine_device: str | None,
    json: bool,
) -> bool:
    """Whether the engine is broken there, or differs from the one here, which is printed."""
    from vitkit.devices.verify import verify_on
    from vitkit.runtimes.card import read_card

    with step_bar() as show:
        found = verify_on(
            machine,
            artifact,
            reference,
            images,
            folder=folder,
            engine_device=engine_device,
            progress=show,
        )
    body = found.to_json(artifact, read_card(artifact), machine.name)
    if json:
        print_json(body)
    else:
        _print_on(machine.name, found, body)
    return found.broken


def _print_on(name: str, found: DeviceParity, body: dict[str, Any]) -> None:
    from vitkit.evaluate.results import side_by_side
    from vitkit.report.text import count_or_figure

    for title, checks in ((name, found.there), ("here", found.here), (f"{name} against here", found.between)):
        if checks:
            typer.echo(f"{title}:")
            print_checks(checks)
    rows = [
        (one.inputs, one.figure.replace("_", " "), *(v if v is None else count_or_figure(v) for v in one[2:]))
        for one in side_by_side(body)
    ]
    if rows:
        print_table(("inputs", "figure", "here", name, f"{name} against here"), rows)
    if found.absent:
        typer.echo(f"not run here: {found.absent}")
    if found.unlike:
        shown = ", ".join(found.unlike[:5]) + (" ..." if len(found.unlike) > 5 else "")
        typer.echo(f"{name} prepares {len(found.unlike)} of the inputs otherwise than this machine: {shown}")
    if found.failure:
        typer.echo(found.failure)
    say(f"sent {found.sent / 1e6:.1f} MB to {name}")
