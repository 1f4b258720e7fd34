"""Operators as a vendor runs them, read back from its engine, and the times that its profiler measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# Runs before those that are profiled: the first ones allocate memory and wake threads.
WARM_UP = 3


class Operator(NamedTuple):
    """One operator of an open engine, as the vendor executes it after its own fusions.

    `name` is the node's, `<module path>/<operator>` in graphs that vitkit exports. `kind` is the vendor's
    name of the kernel (`QLinearConv`, `FullyConnected`, `CONV_2D`). `precision` is what it computes in:
    `fp32`, `fp16`, `bf16`, `int8`, `integer` for arithmetic on pixels, indices and shapes, or `int8 to fp32`
    for a conversion. `device` is the vendor's name of a device, execution provider or delegate. `in_float` is
    the reason why a product that was meant to be INT8 runs in float; empty for all others.
    """

    name: str
    kind: str
    precision: str
    device: str
    in_float: str = ""

    @property
    def module(self) -> str:
        """The path of the module that the operator came from; empty for what the vendor added."""
        if self.name.startswith("/"):
            return self.name[1:].rpartition("/")[0].replace("/", ".")
        return self.name.partition("/")[0] if "/" in self.name else ""


class Timing(NamedTuple):
    """One execution of an operator.

    `start_ns` counts from the beginning of its run; None if the vendor keeps no times of day.
    """

    operator: Operator
    run: int
    start_ns: int | None
    duration_ns: int


class Profile(NamedTuple):
    """What a vendor's profiler measured in some runs of an engine.

    `runs_ns` is the wall time of each run from outside, with what the profiler itself costs. `timings` are in
    the order of execution, run after run, or of one mean run if `is_mean`; empty if the vendor's package
    measures no operators, for the reason `missing`. `source` is the profiler's name.
    """

    runs_ns: Sequence[int]
    timings: Sequence[Timing]
    source: str
    missing: str = ""
    is_mean: bool = False

    @property
    def timed_runs(self) -> int:
        """How many runs `timings` hold."""
        return 1 if self.is_mean else len(self.runs_ns)


def timed(run: Callable[[], object]) -> int:
    """The wall time of a call in ns."""
    start = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - start


def off_device(operators: Iterable[Operator], device: str) -> list[Operator]:
    """Those that do not run on `device`, a vendor's name; arithmetic on shapes and indices is left out.

    Every vendor leaves that to the CPU, where it belongs. Empty if `device` is: nothing is known then.
    """
    return [one for one in operators if device and one.device != device and one.precision != "integer"]


def describe(operators: Sequence[Operator], most: int = 5) -> str:
    """Names and kinds of some operators on one line, at most `most` of them."""
    rest = len(operators) - most
    names = ", ".join(f"{one.name} ({one.kind})" for one in operators[:most])
    return f"{names} and {rest} more" if rest > 0 else names
