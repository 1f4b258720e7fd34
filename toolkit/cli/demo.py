"""`vitkit demo`: every step from data to report, on generated images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitkit.cli.show import is_quiet, say

if TYPE_CHECKING:
    from vitkit.demo.plan import Plan

# Without a terminal the state is printed at the start of each step, and after so many seconds again.
_LINE_EVERY_S = 30.0


def demo(
    out: Annotated[Path, typer.Argument(help="Folder for data, runs, engines, report and pictures.")] = Path(
        "demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="About two minutes: every step works, nothing is learned.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="About 15 minutes: longer training, TFLite engines too.")
    ] = False,
) -> None:
    """Do every step on generated images: train, export, calibrate, verify, evaluate, measure, draw.

    Leaves report.md with tables and pictures, and report.html, which compares the engines. About five
    minutes on two idle CPU cores. Data and finished runs that are in OUT already are used again.
    """
    from vitkit.runtimes.errors import BadRequest

    if quick and full:
        raise BadRequest("--quick and --full exclude each other; use one of them")
    say("loading torch ...")
    from vitkit.demo import run_demo

    with _plan_on_screen() as changed:
        report = run_demo(out, size="quick" if quick else "full" if full else "normal", changed=changed)
    say(f"the report is {report}, and as a page {report.with_suffix('.html')}")


@contextmanager
def _plan_on_screen() -> Iterator[Callable[[Plan], None]]:
    """The state of the plan on standard error: one live line on a terminal, elsewhere a line now and then."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    if is_quiet() or not console.is_terminal:
        yield (lambda plan: None) if is_quiet() else _lines()
        return
    plan: Plan | None = None

    def changed(now: Plan) -> None:
        nonlocal plan
        plan = now

    def line() -> Text:
        return Text("" if plan is None else str(plan))

    # The line counts the time itself, so it is drawn again also while no step advances.
    with Live(get_renderable=line, console=console, refresh_per_second=1, transient=True):
        yield changed


def _lines() -> Callable[[Plan], None]:
    last = ("", 0.0)

    def changed(plan: Plan) -> None:
        nonlocal last
        name, said = last
        if plan.name and (plan.name != name or time.perf_counter() - said > _LINE_EVERY_S):
            say(str(plan))
            last = (plan.name, time.perf_counter())

    return changed
