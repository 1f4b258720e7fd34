"""Turning a model into a verified artifact."""

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.exporters.export import export
from vitkit.exporters.parity import ParityCheck
from vitkit.exporters.source import Reference, Source
from vitkit.exporters.targets import INPUTS, TARGETS, check_request
from vitkit.exporters.verify import check_decisions, run_checks, verify

__all__ = [
    "INPUTS",
    "TARGETS",
    "ParityCheck",
    "Reference",
    "Source",
    "check_decisions",
    "check_request",
    "export",
    "run_checks",
    "verify",
]
