"""The columns of the page's tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vitkit.bench import BenchReport, Ratio
from vitkit.bench.placement import summary
from vitkit.report.results import Evaluation, Results
from vitkit.report.rows import Artifact, Compared, Row, data_of, facts_of, flat, letter, setting_of
from vitkit.report.tables import Cell, Column
from vitkit.report.text import LONG, count_or_figure, shown, significant


def where_column(settings: Sequence[str]) -> Column:
    """The column of the setting that a row ran in, as a letter if there are several."""

    def cell(row: Row) -> Cell:
        setting = setting_of(row.report)
        return _name(letter(settings.index(setting)) if len(settings) > 1 else setting)

    return Column("where", cell, shared=True)


def latency_columns(rows: Sequence[Row], where: Column) -> list[Column]:
    """Of the table of one scope."""
    return [
        Column("artifact", lambda row: _name(row.report.artifact, _marks(row.report))),
        Column("model", lambda row: _name(row.report.name), shared=True),
        Column("target", lambda row: _name(row.report.target), shared=True),
        Column("precision", lambda row: _name(row.report.precision), shared=True),
        where,
        Column("decode", _decode, shared=True),
        *(_percentile(q) for q in (50.0, 90.0, 99.0)),
        Column("images/s", lambda row: _number(row.report.images_per_second)),
        Column("times as fast", lambda row: _speed(row.ratio)),
        *_accuracies(one for row in rows for one in row.evaluations),
        Column("J an image", lambda row: energy_cell(row.report)),
        Column("trtexec GPU ms", lambda row: _trtexec(row.report.trtexec_ns, 1e6)),
        Column("times trtexec", lambda row: _trtexec(row.report.cross_check_ratio, 1)),
        Column("MB", lambda row: _number(row.report.size_bytes / 1e6)),
        Column("n", lambda row: Cell(f"{row.report.n:,}", row.report.n)),
    ]


def artifact_columns(results: Results) -> list[Column]:
    """Of rows of `artifacts_of`."""
    return [
        Column("artifact", lambda row: _name(row.one.artifact)),
        Column("model", lambda row: _name(row.one.name), shared=True),
        Column("target", lambda row: _name(row.one.target)),
        Column("precision", lambda row: _name(row.one.precision)),
        Column("MB", lambda row: None if row.one.size_bytes is None else _number(row.one.size_bytes / 1e6)),
        *_accuracies(results.evaluations),
        Column("files, SHA-256", lambda row: _name(", ".join(_hashes(row.one.files)))),
    ]


def comparison_columns() -> list[Column]:
    """Of rows of `Compared`."""

    def figure(place: str) -> Callable[[Compared], Cell | None]:
        def cell(row: Compared) -> Cell | None:
            value = getattr(row.figure, place)
            return None if value is None else Cell(count_or_figure(value), value)

        return cell

    return [
        Column("artifact", lambda row: _name(row.one.artifact, "" if row.one.ok else "broken")),
        Column("device", lambda row: _name(row.one.machine), shared=True),
        Column("inputs", lambda row: _name(row.figure.inputs)),
        Column("figure", lambda row: _name(row.figure.figure.replace("_", " "))),
        Column("here", figure("here")),
        Column("there", figure("there")),
        Column("there against here", figure("between")),
    ]


def placement_columns(where: Column) -> list[Column]:
    """Columns of what an engine's operators compute in and where; of rows with a placement."""

    def counted(key: str) -> Callable[[Any], Cell]:
        return lambda row: Cell(str(len(row.report.placement[key])), len(row.report.placement[key]))

    return [
        Column("artifact", lambda row: _name(row.report.artifact)),
        where,
        Column("precisions", lambda row: _name(summary(row.report.placement)[0])),
        Column("runs on", lambda row: _name(summary(row.report.placement)[1])),
        Column("elsewhere", counted("off_device")),
        Column("products in float, meant INT8", counted("in_float")),
    ]


def start_columns(rows: Sequence[Row], where: Column) -> list[Column]:
    """Columns of the opening of an artifact and of the stages of scope `image`."""

    def stage(name: str) -> Column:
        def cell(row: Row) -> Cell | None:
            median = row.report.stage_medians_ms.get(name)
            return None if median is None else _number(median)

        return Column(f"{name} ms", cell)

    return [
        Column("artifact", lambda row: _name(row.report.artifact)),
        where,
        Column("scope", lambda row: _name(row.report.scope), shared=True),
        Column("load ms", lambda row: _number(row.report.load_ns / 1e6)),
        Column("first ms", lambda row: _number(row.report.first_ns / 1e6)),
        *(stage(name) for name in dict.fromkeys(name for row in rows for name in row.report.stages_ns)),
        Column("warm-up runs", lambda row: Cell(str(row.report.warmup_runs), row.report.warmup_runs)),
        Column("settings", lambda row: _name(flat(row.report.settings))),
    ]


def environment_columns(calls: Sequence[BenchReport]) -> list[Column]:
    """A column for each call of bench; a row is the name of a fact."""

    def column(i: int, report: BenchReport) -> Column:
        facts = facts_of(report)

        def cell(name: str) -> Cell | None:
            text = facts.get(name)
            return None if text is None else Cell(shown(text, LONG), shown(text, LONG))

        return Column(f"{i}: {report.device}, {report.started[:16].replace('T', ' ')}", cell)

    return [Column("fact", _name), *(column(i, report) for i, report in enumerate(calls, 1))]


def energy_cell(report: BenchReport) -> Cell | None:
    """Joules per image and what measured them; None for a report without."""
    joules = report.joules_per_image
    if joules is None or report.energy is None:
        return None
    return Cell(significant(joules), joules, f"estimate: {report.energy['source']}")


def _marks(report: BenchReport) -> str:
    isa = report.emulated
    return ", ".join(["invalid"] * bool(report.invalid) + [f"emulated {isa}"] * bool(isa))


def _name(text: str, badge: str = "") -> Cell:
    return Cell(shown(text), shown(text), badge)


def _number(value: float) -> Cell:
    return Cell(significant(value), value)


def _decode(row: Row) -> Cell | None:
    decode = row.report.protocol.get("decode")
    return _name(flat(decode)) if decode else None


def _percentile(q: float) -> Column:
    def cell(row: Row) -> Cell:
        ns = row.report.percentile(q)
        return Cell("n too small", None) if ns is None else _number(ns / 1e6)

    return Column(f"p{q:g} ms", cell)


def _trtexec(value: float | None, unit: float) -> Cell | None:
    return None if value is None else _number(value / unit)


def _speed(ratio: Ratio | None) -> Cell | None:
    if ratio is None:
        return None
    interval = "n too small" if ratio.low is None else f"{ratio.low:.2f}–{ratio.high:.2f}"
    return Cell(f"{ratio.ratio:.2f} ({interval})", ratio.ratio)


def _accuracies(evaluations: Iterable[Evaluation]) -> list[Column]:
    """A column for each thing measured, of rows that have `evaluations`."""

    def column(one: Evaluation) -> Column:
        def cell(row: Row | Artifact) -> Cell | None:
            return next((_accuracy(e) for e in row.evaluations if e.subject == one.subject), None)

        return Column(f"{one.metric} % ({data_of(one)})", cell)

    return [column(one) for one in {one.subject: one for one in evaluations}.values()]


def _accuracy(one: Evaluation) -> Cell:
    interval = "" if one.low is None else f" ({one.low:.1f}–{one.high:.1f})"
    return Cell(f"{one.value:.2f}{interval}", one.value)


def _hashes(names: dict[str, str]) -> list[str]:
    return [f"{name} {digest[:8]}" for name, digest in names.items()]
