"""Comparing an engine with a camera's frame rate, for `vitkit bench --fps-target`."""

from __future__ import annotations

import math
from typing import NamedTuple

from vitkit.bench.report import MIN_SAMPLES, BenchReport
from vitkit.runtimes.errors import BadRequest

QUANTILE = 99.0


class FrameRate(NamedTuple):
    """The answer whether a query keeps up with `fps` frames a second at the 99th percentile.

    `p99_ms` is that percentile and `budget_ms` the time there is; `headroom` is the share of the budget that
    is left, negative if the engine is too slow. `holds` and those are None if the samples are too few
    for the percentile. `joules` is the energy of a frame, None if nothing measured it.
    """

    fps: float
    holds: bool | None
    p99_ms: float | None
    budget_ms: float
    headroom: float | None
    joules: float | None


def check_fps(fps: float) -> None:
    """Raises BadRequest for a frame rate that is not a positive number."""
    if not (math.isfinite(fps) and fps > 0):
        raise BadRequest(f"--fps-target is {fps!r}; it must be a positive number of frames a second")


def frame_rate(report: BenchReport, fps: float) -> FrameRate:
    """Hold a report against `fps` frames a second; a query of a batch has the time of all its frames.

    Raises BadRequest for an `fps` that is not positive.
    """
    check_fps(fps)
    budget = report.batch * 1000 / fps
    p99 = report.percentile(QUANTILE)
    if p99 is None:
        return FrameRate(fps, None, None, budget, None, report.joules_per_image)
    headroom = 1 - p99 / 1e6 / budget
    return FrameRate(fps, headroom >= 0, p99 / 1e6, budget, headroom, report.joules_per_image)


def describe(report: BenchReport, fps: float) -> str:
    """The answer in words, or how to measure for one. Raises BadRequest as `frame_rate`."""
    found = frame_rate(report, fps)
    who = f"{report.artifact} ({report.scope})"
    if report.energy is None:
        energy = "energy unknown: this machine has no counter that can be read"
    else:
        energy = f"{found.joules:.3g} J a frame ({report.energy['source']}; an estimate)"
    if report.invalid:
        return f"{who}: no answer for {fps:g} FPS, since the measurement is invalid."
    if found.p99_ms is None or found.headroom is None:
        wanted = MIN_SAMPLES[QUANTILE]
        seconds = math.ceil(1.1 * wanted * sum(report.times_ns) / max(report.n, 1) / 1e9)
        return (
            f"{who}: n too small to know whether it holds {fps:g} FPS at p99, {report.n} queries of "
            f"{wanted}; measure with --duration {seconds}; {energy}."
        )
    verb = "holds" if found.holds else "does not hold"
    spare = f"{found.headroom:.0%} headroom" if found.holds else f"{-found.headroom:.0%} too slow"
    times = f"p99 {found.p99_ms:.2f} ms of {found.budget_ms:.2f} ms"
    return f"{who}: {verb} {fps:g} FPS at p99, {times}, {spare}; {energy}."
