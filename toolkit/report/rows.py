"""Rows of the page: reports with their speed-up and accuracy, artifacts, and the settings they ran in."""

from __future__ import annotations

from typing import Any, NamedTuple

from vitkit.bench import BenchReport, Ratio, compare
from vitkit.evaluate.results import Beside
from vitkit.report.results import Evaluation, Results, Verification

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Row(NamedTuple):
    """One report with what belongs to it: its speed-up, and its artifact's accuracies."""

    report: BenchReport
    ratio: Ratio | None
    evaluations: list[Evaluation]


class Artifact(NamedTuple):
    """One artifact or run of the results."""

    one: BenchReport | Evaluation | Verification
    evaluations: list[Evaluation]


class Compared(NamedTuple):
    """One figure of one artifact, here and on a device."""

    one: Verification
    figure: Beside


def rows_of(results: Results) -> list[Row]:
    """All reports, the fastest median first."""
    ratios: dict[tuple[str, str, str], Ratio] = {}
    for started in dict.fromkeys(report.started for report in results.reports):
        together = [report for report in results.reports if report.started == started]
        ratios |= {(started, ratio.scope, ratio.artifact): ratio for ratio in compare(together)}
    rows = [
        Row(
            report,
            ratios.get((report.started, report.scope, report.artifact)),
            results.evaluations_of(report.files),
        )
        for report in results.reports
    ]
    return sorted(rows, key=lambda row: row.report.percentile(50.0) or 0)


def artifacts_of(results: Results) -> list[Artifact]:
    """Every artifact and run of the results once, by the hashes of its files."""
    found: dict[frozenset[tuple[str, str]], BenchReport | Evaluation | Verification] = {}
    every: list[BenchReport | Evaluation | Verification]
    every = [*results.reports, *results.evaluations, *results.verifications]
    for one in every:
        found.setdefault(frozenset(one.files.items()), one)
    return [Artifact(one, results.evaluations_of(one.files)) for one in found.values()]


def setting_of(report: BenchReport) -> str:
    """Where and how a report was measured: device, CPU, threads, batch."""
    threads = f"{report.threads} threads" if report.threads else "threads as the vendor chooses"
    batch = f", batch {report.batch}" if report.batch > 1 else ""
    return f"{device_of(report)}, {'1 thread' if report.threads == 1 else threads}{batch}"


def device_of(report: BenchReport) -> str:
    """The device and, if it is known, its CPU."""
    cpu = report.environment.get("cpu")
    model = cpu.get("model") if isinstance(cpu, dict) else None
    return f"{report.device} ({model})" if model else report.device


def letter(i: int) -> str:
    """The short name of setting `i`: A, B, ..., Z, 27, 28, ..."""
    return LETTERS[i] if i < len(LETTERS) else str(i + 1)


def machine_of(report: BenchReport) -> str:
    """The name of the device that it was measured on by `--device`; empty for the machine of the bench."""
    machine = report.environment.get("machine")
    return str(machine.get("name", "")) if isinstance(machine, dict) else ""


def is_fast(report: BenchReport) -> bool:
    """True if scope `image` was decoded in the fast mode."""
    decode = report.protocol.get("decode")
    return isinstance(decode, dict) and bool(decode.get("fast"))


def data_of(one: Evaluation) -> str:
    """The data set in short, and how many images of it."""
    place = "/".join(one.data.replace("\\", "/").rstrip("/").split("/")[-2:])
    fast, where = ", fast decode" if one.fast else "", f", on {one.machine}" if one.machine else ""
    return f"{place}, n {one.images:,}{fast}{where}"


def flat(values: Any, depth: int = 4) -> str:
    """A value of JSON on one line, down to a depth."""
    if isinstance(values, (dict, list)) and depth == 0:
        return "…"
    if isinstance(values, dict):
        return ", ".join(f"{key} {flat(value, depth - 1)}" for key, value in values.items())
    if isinstance(values, list):
        return " ".join(flat(value, depth - 1) for value in values)
    return "unknown" if values is None else str(values)


def facts_of(report: BenchReport) -> dict[str, str]:
    """All known circumstances of a report, flattened to one level."""
    facts: dict[str, str] = {"device": report.device}
    for name, value in report.environment.items():
        if isinstance(value, dict):
            facts |= {f"{name} {key}".replace("_", " "): flat(inner) for key, inner in value.items()}
        else:
            facts[name.replace("_", " ")] = flat(value)
    return facts | {"inputs": flat(report.pool), "started": report.started}
