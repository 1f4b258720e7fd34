"""The `vitkit` command: one file per group of commands, heavy imports inside the commands."""

from __future__ import annotations

import os
import signal
import sys

import typer

app = typer.Typer(
    name="vitkit",
    help="Efficient vision models, from a training run to a verified, measured engine on an edge device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

from vitkit.cli import check, data, device, make, predict, use  # noqa: E402, F401


def main() -> None:
    """Run the command line: exit code 0, 2 for what the user can mend, 1 for a bug or a broken engine."""
    # So that whoever writes a temporary folder gets to remove it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except BrokenPipeError:
        # The reader, such as `head`, has gone; Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        from vitkit.runtimes.errors import ExportFailed, VitkitError

        if not isinstance(error, VitkitError):
            raise
        text = " ".join(str(error).split())
        typer.secho(f"vitkit: {text}", fg=typer.colors.RED, err=True)
        sys.exit(1 if isinstance(error, ExportFailed) else 2)
