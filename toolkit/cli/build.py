"""`vitkit build`: the engine of an artifact for TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_checks, print_json, say


def build(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder of target tensorrt.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Artifact folder to write (this machine's cache)."),
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Replay a recorded CUDA graph at every run.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Build the engine of an artifact for TensorRT, on the machine and GPU that are to run it.

    The engine is compared with the float model's golden outputs; a broken one is not written, and exits with
    1. Without --out it is kept in this machine's cache, where whatever opens the artifact finds it.
    """
    from vitkit.exporters.tensorrt import build
    from vitkit.runtimes.files import user_folder

    say("building, which takes minutes ...")
    built, check = build(artifact, out, cuda_graph=cuda_graph)
    if json:
        print_json({"artifact": str(built.path), "bytes": built.size_bytes, "checks": [check.summary()]})
        return
    print_checks([check])
    place = "" if out else f", and kept in {user_folder('cache')}"
    say(f"{built.path}: {built.card.name}, {built.card.precision}, built{place}")
