"""`vitkit verify`: an engine against the float model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from vitkit.cli.arguments import ArtifactArgument, JsonFlag
from vitkit.cli.show import print_checks, print_json, say


def verify(
    artifact: ArtifactArgument,
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--against", help="The run (or a float artifact) that the engine must agree with."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Images to compare on; needs --against."),
    ] = None,
    count: Annotated[int, typer.Option(help="How many of them, spread over the folder.")] = 256,
    json: JsonFlag = False,
) -> None:
    """Check an engine: its golden pairs, and real images against the float model.

    Tensor error, mean cosine and top-1 agreement are held against limits per precision. A flip between
    classes that the float model itself puts within one point of probability is a near tie: a bounded share
    of the images may have one. Of panoptic engines, segments are compared by PQ, and k-means assignments
    one by one; of semantic ones the class of every pixel; of raw tensors every output by itself. Exit code 1
    when the engine is broken.
    """
    from vitkit.evaluate import open_network
    from vitkit.exporters import run_checks
    from vitkit.exporters.parity import check_reference
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.image import generated_photos, sample_photos

    if count < 1:
        raise BadRequest(f"--count is {count}; it must be at least 1")
    if images and not against:
        raise BadRequest("--images needs the float model to compare with: add --against RUN")
    reference = open_network(against) if against else None
    with open_engine(artifact) as engine:
        if reference:
            check_reference(engine.card, reference.card)
        compared = (
            sample_photos(images, count)
            if images
            else [(f"generated {i}", image) for i, image in enumerate(generated_photos(16, seed=1))]
        )
        checks = run_checks(engine, reference, compared)
    if reference:
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
