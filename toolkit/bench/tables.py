"""Reports as tables for the terminal and in Markdown, with the notes that a reader of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitkit.bench.measure import WARMUP_RUNS, WARMUP_S
from vitkit.bench.placement import fallbacks, summary
from vitkit.bench.ratios import Ratio, ratios
from vitkit.bench.report import BenchReport

if TYPE_CHECKING:
    from rich.table import Table

# Runnable processes for each core, before the bench itself, above which latencies are also those of others.
NOISY_LOAD = 0.25
HEADER = ("artifact", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed", "n", "load ms", "first ms", "MB")
STAGE_HEADER = "prepare / run / decode ms"
CHECK_HEADER = "trtexec ms (ratio)"


def _cells(reports: Sequence[BenchReport]) -> dict[str, list[list[str]]]:
    """Header and rows by title, one table for each scope."""
    together = len({report.started for report in reports}) == 1
    speeds = ratios(reports) if together else [None] * len(reports)
    checked = any(report.cross_check for report in reports)
    tables: dict[str, list[list[str]]] = {}
    for report, ratio in zip(reports, speeds, strict=True):
        batch = f", batch {report.batch}" if report.batch > 1 else ""
        emulated = f", emulated {report.emulated}" if report.emulated else ""
        title = f"scope {report.scope}{batch}{emulated}"
        stages = [STAGE_HEADER] if report.stages_ns else []
        checks = [CHECK_HEADER] if report.scope == "engine" and checked else []
        rows = tables.setdefault(title, [[*HEADER, *stages, *checks]])
        rows.append(
            [
                report.artifact,
                *(_time(report.percentile(q)) for q in (50.0, 90.0, 99.0)),
                f"{report.images_per_second:.1f}",
                _speed(ratio),
                str(report.n),
                _time(report.load_ns),
                _time(report.first_ns),
                f"{report.size_bytes / 1e6:.1f}",
                *(
                    [" / ".join(f"{value:.2f}" for value in report.stage_medians_ms.values())]
                    if stages
                    else []
                ),
                *([_checked(report)] if checks else []),
            ]
        )
    return tables


def _time(ns: int | None) -> str:
    return "n too small" if ns is None else f"{ns / 1e6:.2f}"


def _checked(report: BenchReport) -> str:
    if report.cross_check is None:
        return "-"
    time, ratio = report.trtexec_ns, report.cross_check_ratio
    return f"{time / 1e6:.2f} ({ratio:.2f})" if time and ratio else "failed"


def _speed(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    interval = "n too small" if ratio.low is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
    return f"{ratio.ratio:.2f} ({interval})"


def notes(reports: Sequence[BenchReport]) -> list[str]:
    """Circumstances that a reader of the numbers must know, one to a line; invalid measurements first."""
    invalid = [
        f"INVALID: {report.artifact} ({report.scope}): {reason}."
        for report in reports
        if (reason := report.invalid)
    ]
    return invalid + list(dict.fromkeys(line for report in reports for line in _circumstances(report)))


def _circumstances(report: BenchReport) -> list[str]:
    environment, pool = report.environment, report.pool
    cpu = environment["cpu"]
    machine = f"Measured on {environment['machine']['name']}. " if "machine" in environment else ""
    features = " ".join(cpu["features"] or []) or "unknown"
    cores = cpu["usable_cores"] or cpu["cores"] or "unknown"
    return [
        *_warnings(report),
        *check_notes(report),
        *_places(report),
        f"{machine}Device {report.device}; CPU {cpu['model'] or 'unknown'}, cores {cores}, features "
        f"{features}; threads {report.threads or 'as the vendor chooses'}.",
        f"Governor {cpu['governor'] or 'unknown'}; load average {_load(environment['load_average_before'])} "
        f"before, {_load(environment['load_average_after'])} after.",
        f"Inputs drawn with replacement from {pool['size']} images ({pool['source']}), seed {pool['seed']}.",
        f"Single stream, interleaved in blocks; a warm-up of at least {WARMUP_RUNS} runs and {WARMUP_S:g} s "
        "for each row is excluded. Percentiles by nearest rank, if n supports them at 99 % confidence.",
        "speed: within a round, median time per image of the scope's first artifact over this one's; median "
        "of the rounds (95 % interval).",
    ]


def _warnings(report: BenchReport) -> list[str]:
    cpu = report.environment["cpu"]
    fell_back = fallbacks(report.placement) if report.placement else []
    lines = [f"FELL BACK: {report.artifact}: {line}." for line in fell_back]
    if report.emulated:
        beyond = report.settings.get("beyond_cap", {})
        exceptions = ", ".join(f"{count} {kernel}" for kernel, count in beyond.items())
        ignored = f"These kernels ignore the cap, so a real CPU is slower: {exceptions}."
        lines.append(
            f"EMULATED: {report.artifact} may use no more than {report.emulated} here; clocks, caches and "
            f"memory stay this machine's. {ignored if beyond else 'All kernels respect the cap.'}"
        )
    load, cores = report.environment["load_average_before"], cpu["usable_cores"] or cpu["cores"]
    if load and cores and load[0] > NOISY_LOAD * cores:
        lines.append(
            f"NOISY: before the start {load[0]:.1f} processes wanted the {cores} cores, so p90 and p99 "
            "include the time of other programs. Ratios suffer less, since engines took turns."
        )
    return lines


def _places(report: BenchReport) -> list[str]:
    if report.placement is None:
        return []
    precisions, devices = summary(report.placement)
    return [f"Operators of {report.artifact}: {precisions}; on {devices}."] if precisions else []


def check_notes(report: BenchReport) -> list[str]:
    """The result of the cross-check by `trtexec`, its limits and its warnings; empty without one."""
    found, time = report.cross_check, report.trtexec_ns
    if found is None:
        return []
    if time is None:
        return [f"No cross-check of {report.artifact}: {found['problem']}."]
    return [
        f"Cross-check of {report.artifact}: trtexec {found['version']} measured {time / 1e6:.2f} ms of GPU "
        f"time alone (median of {len(found['gpu_ns'])} queries): no copies, a CUDA graph, the next query "
        f"always queued. p50 here is {report.cross_check_ratio:.2f} times that, with copies, launches, "
        "waiting and Python; below 1 the clocks differed.",
        *(f"trtexec warns of {report.artifact}: {warning}" for warning in found["warnings"]),
    ]


def _load(values: list[float] | None) -> str:
    return "unknown" if values is None else " ".join(f"{value:.2f}" for value in values)


def to_tables(reports: Sequence[BenchReport]) -> list[Table]:
    """Reports as tables for the terminal, one for each scope and an artifact a column; add `notes` below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    results = []
    for title, rows in _cells(reports).items():
        # As Text: an artifact's name may hold what looks like markup.
        (_, *names), *lines = (list(map(Text, line)) for line in zip(*rows, strict=True))
        table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        results.append(table)
    return results


def to_markdown(reports: Sequence[BenchReport]) -> str:
    """Reports as a Markdown table for each scope, followed by the notes as a list."""
    lines = []
    for title, (header, *rows) in _cells(reports).items():
        cells = [header, ["---"] * len(header), *rows]
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        lines += [f"**{title}**", "", *body, ""]
    return "\n".join([*lines, *(f"- {line}" for line in notes(reports)), ""])
