"""`vitkit build`: the engine of a TensorRT package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_checks, print_json, say

if TYPE_CHECKING:
    pass


def build(
    package: Annotated[Path, typer.Argument(help="Artifact folder of target tensorrt.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Artifact folder to write (this machine's cache)."),
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Replay a recorded CUDA graph at every run.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Build the engine of a TensorRT package, on the machine and GPU that are to run it.

    The engine is compared with the float model's golden outputs; a broken one is not written, and exits with
    1. Without --out it is kept in this machine's cache, where whatever opens the package finds it.
    """
    from vitkit.exporters.tensorrt import build

    say("building, which takes minutes ...")
    artifact, check = build(package, out, cuda_graph=cuda_graph)
    if json:
        print_json(
            {"artifact": str(artifact.path), "bytes": artifact.size_bytes, "checks": [check.summary()]}
        )
        return
    print_checks([check])
    say(f"{artifact.path}: {artifact.card.name}, {artifact.card.precision}, built")
