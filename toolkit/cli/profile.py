"""`vitkit profile`: time by operator and by module."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vitkit.cli.arguments import ArtifactArgument, DeviceHere, JsonFlag, Threads
from vitkit.cli.show import print_json, print_table, say

if TYPE_CHECKING:
    from vitkit.bench.profile import Share

_MOST_ROWS = 20
_ADDED = "(added by the vendor)"
_FIGURES = ("operators", "ms", "share %")
_log = logging.getLogger(__name__)


def profile(
    artifact: ArtifactArgument,
    device: DeviceHere = None,
    threads: Threads = None,
    runs: Annotated[int, typer.Option(help="Runs that are profiled, after some that are not.")] = 20,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Folder to take the input image from (a generated one)."),
    ] = None,
    json: JsonFlag = False,
    trace: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--trace", help="Write a trace for chrome://tracing and Perfetto to this file."),
    ] = None,
) -> None:
    """Show the time of an engine by operator and by module, measured by its vendor's own profiler.

    Profiling costs time itself: for the latency of an engine use vitkit bench.
    """
    from vitkit.bench.profile import profile, write_trace
    from vitkit.runtimes.files import check_writable

    if trace:
        check_writable(trace)
    found = profile(artifact, device=device, threads=threads, runs=runs, images=images)
    if json:
        print_json(found.to_json())
    else:
        print_table(("kind", "precision", "runs on", *_FIGURES), _rows(found.by_operator))
        modules = [one._replace(label=(one.label[0] or _ADDED,)) for one in found.by_module]
        print_table(("module", *_FIGURES), _rows(modules))
        typer.echo(
            f"{found.artifact} on {found.device}: {found.run_ms:.3f} ms a run, mean of {runs}, of which "
            f"{found.operators_ms:.3f} ms in operators, by the {found.profile.source}."
        )
    if found.profile.missing:
        _log.warning("%s", found.profile.missing)
    if trace:
        write_trace(found, trace)
        say(f"trace: {trace}")


def _rows(shares: Sequence[Share]) -> list[tuple[object, ...]]:
    """The slowest, and all others in one row."""
    shown = list(shares[:_MOST_ROWS])
    if rest := shares[_MOST_ROWS:]:
        number, ms, share = (sum(getattr(one, name) for one in rest) for name in ("operators", "ms", "share"))
        label = (f"{len(rest)} others", *[""] * (len(rest[0].label) - 1))
        shown.append(rest[0]._replace(label=label, operators=number, ms=ms, share=share))
    return [(*one.label, f"{one.operators:g}", round(one.ms, 4), round(100 * one.share, 1)) for one in shown]
