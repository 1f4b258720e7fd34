"""Sortable tables of HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vitkit.report.text import LONG, html


class Cell(NamedTuple):
    """The text of a cell and the key it is sorted by; a cell without `key` comes last."""

    text: str
    key: str | float | None
    badge: str = ""


class Column(NamedTuple):
    """A column; `cell` gives None for a row without a value. Left out if no row has one.

    A `shared` column that is the same in all rows is printed once, above the table.
    """

    title: str
    cell: Callable[[Any], Cell | None]
    shared: bool = False


def table(columns: Sequence[Column], rows: Sequence[Any], name: str) -> str:
    """The first column names the row. Numbers stand at the right."""
    cells = {column: [column.cell(row) for row in rows] for column in columns}
    filled = [column for column in columns if any(cells[column])]
    shared = [one for one in filled if one.shared and len(rows) > 1 and len(set(cells[one])) == 1]
    kept = [column for column in filled if column not in shared]
    kinds = [(one, _is_numeric(cells[one])) for one in kept]
    head = "".join(_header(one.title, number) for one, number in kinds)
    lines = [
        [_cell(cells[one][i], number, one is kept[0]) for one, number in kinds] for i in range(len(rows))
    ]
    body = "".join(f"<tr>{''.join(line)}</tr>\n" for line in lines)
    said = "; ".join(f"{html(one.title)} <b>{html(_text(cells[one][0]))}</b>" for one in shared)
    return (
        (f"<p class=shared>All rows: {said}.</p>\n" if said else "")
        + f'<div class=scroll tabindex=0 role=region aria-label="{html(name)}"><table>\n'
        + f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _is_numeric(cells: Sequence[Cell | None]) -> bool:
    return all(not isinstance(cell.key, str) for cell in cells if cell)


def _text(cell: Cell | None) -> str:
    return cell.text if cell else "–"


def _header(title: str, numeric: bool) -> str:
    kind = " class=number" if numeric else ""
    return f"<th scope=col{kind}><button type=button>{html(title)}</button></th>"


def _cell(cell: Cell | None, numeric: bool, first: bool) -> str:
    absent = cell is None or cell.key is None
    classes = " ".join(["number"] * numeric + ["absent"] * absent)
    attributes = (" scope=row" if first else "") + (f' class="{classes}"' if classes else "")
    if cell is not None and cell.key is not None:
        attributes += f' data-key="{html(cell.key, LONG)}"'
    badge = f" <span class=badge>{html(cell.badge)}</span>" if cell and cell.badge else ""
    tag = "th" if first else "td"
    return f"<{tag}{attributes}><bdi>{html(_text(cell), LONG)}</bdi>{badge}</{tag}>"
