"""The command line as a whole: its commands in order, and what an error becomes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from vitkit.cli.bench import bench
from vitkit.cli.build import build
from vitkit.cli.data import data
from vitkit.cli.demo import demo
from vitkit.cli.device import device
from vitkit.cli.doctor import doctor
from vitkit.cli.evaluate import evaluate
from vitkit.cli.export import export
from vitkit.cli.import_ import import_
from vitkit.cli.inspect import inspect
from vitkit.cli.models import models
from vitkit.cli.predict import predict
from vitkit.cli.profile import profile
from vitkit.cli.recipes import recipes
from vitkit.cli.report import report
from vitkit.cli.show import show_log
from vitkit.cli.train import train
from vitkit.cli.verify import verify

app = typer.Typer(
    name="vitkit",
    help="Efficient vision models, from a training run to a verified, measured engine on an edge device.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what is done in more detail.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show results, warnings and errors only.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version of vitkit and exit.")]

_MAKE = (models, train, recipes, import_, export, build)
_CHECK = (verify, evaluate, bench, profile, report, inspect)
_USE = (predict, doctor, demo)
for _command in (*_MAKE, *_CHECK, *_USE):
    app.command(_command.__name__.rstrip("_"))(_command)
app.add_typer(data, name="data")
app.add_typer(device, name="device")


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context, version: Version = False, verbose: Verbose = False, quiet: Quiet = False
) -> None:
    if version:
        from vitkit import __version__

        typer.echo(f"vitkit {__version__}")
        raise typer.Exit()
    show_log(verbose=verbose, quiet=quiet)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def _with_log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with `--verbose` and `--quiet`, which thus work before and after its name."""

    @wraps(command)
    def run(*, verbose: bool, quiet: bool, **values: Any) -> Any:
        show_log(verbose=verbose, quiet=quiet)
        return command(**values)

    # Typer reads both, and evaluates neither when they are given.
    own = signature(command, eval_str=True)
    extra = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("verbose", Verbose), ("quiet", Quiet))
    ]
    parameters = [*own.parameters.values(), *extra]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


for _group in (app, data, device):
    for _registered in _group.registered_commands:
        if _registered.callback:
            _registered.callback = _with_log_options(_registered.callback)


def main() -> None:
    """Run the command line: exit code 0, 2 for what the user can mend, 1 for a bug or a broken engine."""
    # So that whoever writes a temporary folder gets to remove it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Names of files may be what no encoding has; they are shown as `\\udce9`, also what JSON has for them.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
