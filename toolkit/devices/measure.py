"""Measuring artifacts in this process, in one of its own, or on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitkit.bench import BenchOptions, BenchReport, Progress, bench
from vitkit.bench.measure import silent
from vitkit.devices.link import bench_on
from vitkit.devices.registry import Device
from vitkit.devices.worker import bench_apart


def measure(
    artifacts: Sequence[Path],
    options: BenchOptions,
    machine: Device | None = None,
    *,
    progress: Progress = silent,
) -> list[BenchReport]:
    """Measure artifacts on `machine`, or here if it is None; `registry.find_machine` finds one by its name.

    Here, `options.max_isa` gets a process of its own, because OpenVINO reads it once. Raises what `bench`
    and `bench_on` raise.
    """
    if machine is not None:
        return bench_on(machine, artifacts, options, progress=progress)
    if options.max_isa is not None:
        return bench_apart(artifacts, options, progress=progress)
    return bench(artifacts, options, progress=progress)
