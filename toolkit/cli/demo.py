"""`vitkit demo`: the whole way on generated data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitkit.cli.show import say, share_the_machine


def demo(
    out: Annotated[Path, typer.Argument(help="Folder for data, run, engines, report and pictures.")] = Path(
        "demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A small fraction of the data and training: shows the way only.")
    ] = False,
) -> None:
    """Walk the whole way on generated data: train, export, calibrate, verify, evaluate, measure, draw.

    Leaves report.md with a table and pictures, and report.html, which compares the engines. About a quarter
    of an hour on two CPU cores. A finished training in OUT is used again.
    """
    share_the_machine()
    from vitkit.demo import run_demo

    report = run_demo(out, quick=quick)
    say(f"the report is {report}")
