"""Speed ratios of artifacts measured together, each against the first one of its scope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from vitkit.bench.report import BenchReport
from vitkit.runtimes.errors import BadInput, BadRequest


class Ratio(NamedTuple):
    """How many times faster an artifact is than the reference, per image, in one scope.

    Each round gives a ratio, the reference's median time in it over this artifact's, so that both met the
    same moments of the machine; `ratio` is the median over the rounds. `low` and `high` bound it at 95 %
    confidence by the order statistics of the ratios, which assumes nothing about their distribution; None
    below 6 rounds, which cannot support it.
    """

    artifact: str
    reference: str
    scope: str
    ratio: float
    low: float | None
    high: float | None
    rounds: int


def compare(reports: Sequence[BenchReport]) -> list[Ratio]:
    """Each artifact against the first one of its scope, above 1 if it is faster.

    Raises BadRequest for reports that were not measured together.
    """
    return [ratio for ratio in ratios(reports) if ratio is not None]


def ratios(reports: Sequence[BenchReport]) -> list[Ratio | None]:
    """For each report its ratio to the first one of its scope, None for that one; raises as `compare`."""
    first: dict[str, BenchReport] = {}
    references = [first.setdefault(report.scope, report) for report in reports]
    return [
        None if reference is report else _ratio(reference, report)
        for reference, report in zip(references, reports, strict=True)
    ]


def _ratio(reference: BenchReport, report: BenchReport) -> Ratio:
    if reference.started != report.started:
        raise BadRequest(
            f"{reference.artifact} and {report.artifact} were not measured together, so their times do not "
            f"compare; measure them in one go: vitkit bench {reference.artifact} {report.artifact}"
        )
    per_image = report.batch / reference.batch
    base, mine = _round_medians(reference), _round_medians(report)
    by_round = [base[number] / mine[number] * per_image for number in sorted(base.keys() & mine.keys())]
    if not by_round:
        raise BadInput(
            f"{reference.artifact} and {report.artifact} have no round in common; measure them again"
        )
    low, high = _median_interval(by_round)
    return Ratio(
        report.artifact, reference.artifact, report.scope, median(by_round), low, high, len(by_round)
    )


def _round_medians(report: BenchReport) -> dict[int, float]:
    times: dict[int, list[int]] = {}
    for number, each in zip(report.rounds, report.times_ns, strict=True):
        times.setdefault(number, []).append(each)
    return {number: median(values) for number, values in times.items()}


def _median_interval(values: list[float]) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of the median: each value is above it with a chance of one half (sign test)."""
    ordered, cut, tail = sorted(values), 0, 0.0
    while cut <= len(ordered):
        tail += math.comb(len(ordered), cut) / 2 ** len(ordered)
        if 2 * tail > 0.05:
            break
        cut += 1
    return (ordered[cut - 1], ordered[-cut]) if cut else (None, None)
