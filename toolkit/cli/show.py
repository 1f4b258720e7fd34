"""What the commands share: tables, progress and JSON on the terminal."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

_log = logging.getLogger("vitkit")

if TYPE_CHECKING:
    from vitkit.exporters.parity import ParityCheck


def print_json(body: Any) -> None:
    """Machine-readable output, alone on standard output."""
    typer.echo(json.dumps(body, indent=1, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on the terminal; numbers are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As Text: names of files and classes may hold what looks like markup.
    table = Table(title=None if title is None else Text(title), title_justify="left")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console().print(table)


class _StandardError(logging.Handler):
    """Log records as plain lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; warnings are marked."""
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        typer.echo(f"{mark}{self.format(record)}", err=True)


def show_log(*, verbose: bool = False, quiet: bool = False) -> None:
    """Show the logger `vitkit` on standard error, normally from INFO on.

    `verbose` shows DEBUG too, `quiet` only WARNING and above. Raises BadRequest when both are asked for.
    """
    if verbose and quiet:
        from vitkit.runtimes.errors import BadRequest

        raise BadRequest("--verbose and --quiet exclude each other; use one of them")
    if not any(isinstance(handler, _StandardError) for handler in _log.handlers):
        _log.addHandler(_StandardError())
        _log.setLevel(logging.INFO)
        # Nothing twice: an application's root logger is not the command line's.
        _log.propagate = False
    if verbose or quiet:
        _log.setLevel(logging.DEBUG if verbose else logging.WARNING)


def is_quiet() -> bool:
    """Whether the user asked for warnings and errors only."""
    return not _log.isEnabledFor(logging.INFO)


def say(text: str) -> None:
    """A line of progress for the user, on standard error, so that standard output stays clean."""
    _log.info("%s", text)


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; call what it yields with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=is_quiet()), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def step_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error with the present step and the time left; call what it yields with both.

    The step is text, beside it the share of the time that is over, 0 to 1.
    A share below the one before begins a new phase, with its own time left. It draws only when it is called,
    so that it takes no time from what is measured between two calls.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), name)
    console = Console(stderr=True, quiet=is_quiet())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=1.0)

        def show(step: str, share: float) -> None:
            if share < bar.tasks[task].completed:
                bar.reset(task)
            bar.update(task, description=step, completed=share)
            bar.refresh()

        yield show


def key_values(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """`["a=1", "b=2"]` -> a dictionary; raises BadRequest for an item without `=`."""
    from vitkit.runtimes.errors import BadRequest

    values = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise BadRequest(f"{flag} {pair!r} is not of the form key=value")
        values[key] = value
    return values


def print_checks(checks: list[ParityCheck]) -> None:
    """Each parity check on a line, and the images that stand out."""
    for check in checks:
        typer.echo(str(check))
        for line in check.details():
            typer.echo(f"  {line}")
