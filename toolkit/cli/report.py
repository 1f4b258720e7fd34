"""`vitkit report`: one page that compares artifacts and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitkit.cli.show import say


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Files of vitkit bench --json FILE, vitkit evaluate --json > FILE and "
            "vitkit verify --device NAME --json > FILE."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained page that compares measured artifacts and devices.

    Latency of every query, accuracy against latency, size, engines here and on devices side by side,
    environment, and what is an estimate. Results of
    one artifact are joined by the hashes of its files. The page needs no network and prints well.
    """
    from vitkit.report import write_report

    say(f"the page is {write_report(results, out)}")
