"""Benchmarks of engines: `bench(artifacts, BenchOptions(...))` returns reports with all raw times."""

import sys

from vitkit import CallablePackage
from vitkit.bench.measure import Progress, bench, labels
from vitkit.bench.options import SCOPES, BenchOptions
from vitkit.bench.ratios import Ratio, compare
from vitkit.bench.report import MIN_SAMPLES, BenchReport, load, save
from vitkit.bench.tables import notes, to_markdown, to_tables

__all__ = [
    "MIN_SAMPLES",
    "SCOPES",
    "BenchOptions",
    "BenchReport",
    "Progress",
    "Ratio",
    "bench",
    "compare",
    "labels",
    "load",
    "notes",
    "save",
    "to_markdown",
    "to_tables",
]

sys.modules[__name__].__class__ = CallablePackage
