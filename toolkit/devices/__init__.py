"""Machines that engines are measured on: what they are called, how they are reached, what they tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitkit.bench import BenchReport, Progress


def measure(
    artifacts: Sequence[Path],
    options: Mapping[str, Any],
    *,
    devices: Path | None,
    max_isa: str | None,
    progress: Progress,
) -> list[BenchReport]:
    """Measure artifacts where `options["device"]` says: in this process, or on an entry of `devices`.

    `options` are those of `vitkit.bench.bench` less `progress`, with `NAME` or `NAME:DEVICE` for an entry and
    its engine's own device there. Without that, and where there is no `device` at all, each artifact takes
    the device of its target (`cuda` for TensorRT, else `cpu`). `devices` is the file of the user's devices
    (None: the default one). Under `max_isa` a process of its own measures. Raises what `bench`, `find_device`
    and the device raise.
    """
    from vitkit.bench import bench
    from vitkit.devices.registry import default_file, find_device

    wanted, _, engine = (options.get("device") or "").partition(":")
    there = find_device(wanted, devices or default_file()) if wanted else None
    if there or wanted == "jetson":
        options = {**options, "device": engine or None}
    if there:
        from vitkit.devices.link import bench_on

        return bench_on(there, artifacts, options, max_isa=max_isa, progress=progress)
    if max_isa is not None:
        from vitkit.devices.worker import bench_apart

        return bench_apart(artifacts, options, max_isa=max_isa, progress=progress)
    return bench(artifacts, **options, progress=progress)
