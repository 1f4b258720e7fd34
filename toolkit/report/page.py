"""The page: results in, one HTML text out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from vitkit.bench import SCOPES, BenchReport
from vitkit.bench.placement import fallbacks
from vitkit.bench.tables import check_notes
from vitkit.report.columns import (
    artifact_columns,
    comparison_columns,
    energy_cell,
    environment_columns,
    latency_columns,
    placement_columns,
    start_columns,
    where_column,
)
from vitkit.report.plots import SERIES, Point, Strip, pareto, strips
from vitkit.report.results import Evaluation, Results
from vitkit.report.rows import (
    Compared,
    Row,
    artifacts_of,
    data_of,
    device_of,
    facts_of,
    is_fast,
    letter,
    machine_of,
    rows_of,
    setting_of,
)
from vitkit.report.tables import Column, table
from vitkit.report.text import LONG, html

_TITLE = "<title>vitkit report</title>"
_DOTS = (
    "Each dot is one query; from top to bottom of a strip they are in the order they ran, so that a drift "
    "shows as a slant. None is clipped. The thick line is the median; p90 and p99 are shown if the number of "
    "queries supports them at 99 % confidence."
)
_ESTIMATE = "<b>Estimate:</b> "
_TIMES = (
    "Times are measured, single stream, nothing clipped, after a warm-up that is not counted. A percentile "
    "is printed if the number of queries supports it at 99 % confidence; the median always."
)
_SPEED = (
    "how many times as fast. Within each round of a bench, the median time per image of the scope's first "
    "artifact over this one's; the median of the rounds with its 95 % interval."
)
_APART = (
    "a comparison across separate bench calls. Only artifacts of one call were measured in turns and met the "
    "same moments of the machine."
)
_SHARE = (
    "top-1 from a limited number of images, with Wilson's 95 % interval. Engines saw the same images, so "
    "their differences are surer than their intervals."
)
_ENERGY = "energy, of all that ran: from the counters of a CPU or a board, not from a meter at the wall."
_EMULATED = (
    "rows marked as emulated: the engine was limited to a lesser instruction set; clocks, caches and memory "
    "stay those of this CPU."
)
_GENERATED = "latency on generated images stands for that on real ones."
_BESIDE = (
    "The same engine on the machine that compared and on a device: both against the float model, and, in the "
    "last column, the outputs there against those here."
)
_ACCURACY = "Accuracy is a separate run of the same artifact, recognised by the hashes of its files."


def page(results: Results) -> str:
    """The whole page as HTML; it loads nothing from the network and runs no script but its own."""
    rows = rows_of(results)
    settings = list(dict.fromkeys(setting_of(row.report) for row in rows))
    scopes = dict.fromkeys(row.report.scope for row in rows)
    where = where_column(settings)
    sections = [
        _scope(scope, [row for row in rows if row.report.scope == scope], settings, where) for scope in scopes
    ]
    body = [
        _heading(results),
        _warnings(results.reports),
        _legend(settings),
        *sections,
        _artifacts(results),
        _comparisons(results),
        _placement(rows, where),
        _start(rows, where),
        _circumstances(results.reports),
        _estimates(results, rows),
    ]
    return _document("".join(body))


def is_page(file: Path) -> bool:
    """True for a file that holds a page made by `page`."""
    try:
        with file.open("rb") as opened:
            return _TITLE.encode() in opened.read(2000)
    except OSError:
        return False


def _document(body: str) -> str:
    here = files("vitkit.report")
    style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is loaded, and of all scripts only this one runs, whatever the results' names hold.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{_TITLE}\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _heading(results: Results) -> str:
    days = sorted({report.started[:10] for report in results.reports})
    facts = [
        _count(len(artifacts_of(results)), "artifact"),
        _count(len({device_of(report) for report in results.reports}), "device"),
        f"{sum(report.n for report in results.reports):,} timed queries",
        *([f"measured {' to '.join(dict.fromkeys((days[0], days[-1])))}"] if days else []),
    ]
    return f"<header><h1>vitkit report</h1>\n<p>{html(' · '.join(facts), LONG)}</p></header>\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _warnings(reports: Sequence[BenchReport]) -> str:
    invalid = [
        f"<b>Invalid:</b> {html(report.artifact)} (scope {html(report.scope)}): {html(report.invalid)}."
        for report in reports
        if report.invalid
    ]
    fell_back = [
        f"<b>Fell back:</b> {html(report.artifact)} on {html(report.device)}: {html(line, LONG)}."
        for report in reports
        if report.placement
        for line in fallbacks(report.placement)
    ]
    items = list(dict.fromkeys([*invalid, *fell_back]))
    return f"<div class=warning role=note>{_list(items)}</div>\n" if items else ""


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>\n" for item in items) + "</ul>"


def _legend(settings: Sequence[str]) -> str:
    if len(settings) < 2:
        return ""
    items = [
        f'<span class=key style="background:var(--series-{i % SERIES})">{letter(i)}</span> {html(setting)}'
        for i, setting in enumerate(settings)
    ]
    return f"<section class=legend><h2>Where it ran</h2>{_list(items)}</section>\n"


def _scope(scope: str, rows: Sequence[Row], settings: Sequence[str], where: Column) -> str:
    def label(row: Row, beside: Sequence[Row]) -> str:
        model = f"{row.report.name}/" if len({other.report.name for other in beside}) > 1 else ""
        text = f"{model}{row.report.artifact}{' (invalid)' if row.report.invalid else ''}"
        return f"{letter(place(row))} {text}" if len(settings) > 1 else text

    def place(row: Row) -> int:
        return settings.index(setting_of(row.report))

    what = f": {html(SCOPES[scope])}" if scope in SCOPES else ""
    figures = [_distribution(scope, rows, [(label(row, rows), place(row)) for row in rows])]
    valid = [row for row in rows if not row.report.invalid]
    for subject in dict.fromkeys(one.subject for row in valid for one in row.evaluations):
        found = [
            (row, one)
            for row in valid
            for one in row.evaluations
            if one.subject == subject
            and (scope == "engine" or one.fast == is_fast(row.report))
            # Accuracy of a device stands for that device; accuracy from here stands for any.
            and one.machine in ("", machine_of(row.report))
        ]
        beside = [row for row, _ in found]
        points = [(label(row, beside), place(row), row.report, one) for row, one in found]
        if len(points) > 1:
            figures.append(_tradeoff(scope, points))
    return (
        f"<section><h2>Scope {html(scope)}{what}</h2>\n<div class=figures>{''.join(figures)}</div>\n"
        f"{table(latency_columns(rows, where), rows, f'Latency, scope {scope}')}</section>\n"
    )


def _figure(svg: str, title: str, text: str) -> str:
    return f"<figure><h3>{html(title)}</h3>\n{svg}<figcaption>{html(text, LONG)}</figcaption></figure>\n"


def _distribution(scope: str, rows: Sequence[Row], labels: Sequence[tuple[str, int]]) -> str:
    shown_rows = [
        Strip(
            label,
            series,
            [time / 1e6 for time in row.report.times_ns],
            {
                name: value
                for name, value in row.report.percentiles_ms.items()
                if value is not None and name in ("p50", "p90", "p99")
            },
        )
        for row, (label, series) in zip(rows, labels, strict=True)
    ]
    svg = strips(shown_rows, f"Latency of every query, scope {scope}", "ms a query")
    return _figure(svg, "Latency of every query", _DOTS)


def _tradeoff(scope: str, found: Sequence[tuple[str, int, BenchReport, Evaluation]]) -> str:
    # The headline is p90; if one row cannot support it, all fall back to the median.
    q = 90.0 if all(report.percentile(90.0) for _, _, report, _ in found) else 50.0
    points = [
        Point(label, series, (report.percentile(q) or 0) / 1e6 / report.batch, one.value, one.low, one.high)
        for label, series, report, one in found
    ]
    one = found[0][3]
    title = f"{one.metric} against latency"
    svg = pareto(
        points,
        f"{title}, scope {scope}, {data_of(one)}",
        f"p{q:g} ms an image",
        f"{one.metric} %, {data_of(one)}",
    )
    interval = " Bars are 95 % intervals of the accuracy." if one.low is not None else ""
    text = (
        f"Up and left is better. The dashed steps join what nothing else beats on the same device.{interval}"
    )
    return _figure(svg, title, text)


def _artifacts(results: Results) -> str:
    found = table(artifact_columns(results), artifacts_of(results), "Artifacts")
    return f"<section><h2>Artifacts</h2>\n{found}</section>\n"


def _comparisons(results: Results) -> str:
    if not results.verifications:
        return ""
    failed = [
        f"<b>Failed:</b> {html(one.artifact)}: {html(one.failure, LONG)}."
        for one in results.verifications
        if one.failure
    ]
    rows = [Compared(one, figure) for one in results.verifications for figure in one.figures]
    found = table(comparison_columns(), rows, "Here and there") if rows else ""
    warning = f"<div class=warning role=note>{_list(failed)}</div>\n" if failed else ""
    return f"<section><h2>Here and there</h2>\n<p>{_BESIDE}</p>\n{warning}{found}</section>\n"


def _placement(rows: Sequence[Row], where: Column) -> str:
    # An engine runs alike in all scopes, so one row is enough.
    once = {(row.report.artifact, setting_of(row.report)): row for row in rows if row.report.placement}
    if not once:
        return ""
    text = (
        "Operators as the vendor executes them after its own fusions, read back from the engine that was "
        "measured: how many compute in each precision, and how many run on each device or delegate."
    )
    found = table(placement_columns(where), list(once.values()), "Where the operators run")
    return f"<section><h2>Where the operators run</h2>\n<p>{text}</p>\n{found}</section>\n"


def _start(rows: Sequence[Row], where: Column) -> str:
    if not rows:
        return ""
    text = "Load is the opening of the artifact, first the first run after it; stages are medians."
    found = table(start_columns(rows, where), rows, "Start and stages")
    return f"<section><h2>Start and stages</h2>\n<p>{text}</p>\n{found}</section>\n"


def _circumstances(reports: Sequence[BenchReport]) -> str:
    calls = list({report.started: report for report in reports}.values())
    if not calls:
        return ""
    names = list(dict.fromkeys(name for call in calls for name in facts_of(call)))
    found = table(environment_columns(calls), names, "Environment")
    return f"<section><h2>Environment</h2>\n{found}</section>\n"


def _estimates(results: Results, rows: Sequence[Row]) -> str:
    reports, calls = results.reports, {report.started for report in results.reports}
    lines = [
        (bool(reports), _TIMES),
        (any(row.ratio for row in rows), _ESTIMATE + _SPEED),
        (len(calls) > 1, _ESTIMATE + _APART),
        (any(one.low is not None for one in results.evaluations), _ESTIMATE + _SHARE),
        (any(map(energy_cell, reports)), _ESTIMATE + _ENERGY),
        (any(report.emulated for report in reports), _ESTIMATE + _EMULATED),
        (any(report.pool.get("source") == "generated" for report in reports), _ESTIMATE + _GENERATED),
        (bool(results.evaluations), _ACCURACY),
    ]
    checks = [html(note, LONG) for report in reports for note in check_notes(report)]
    items = _list([*(line for holds, line in lines if holds), *checks])
    return f"<section><h2>What is measured, what is an estimate</h2>\n{items}</section>\n"
