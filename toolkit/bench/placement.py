"""Where the operators of an open engine run, read back from its vendor, and what fell back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitkit.runtimes.engine import Engine
from vitkit.runtimes.operators import Operator, describe, off_device

_LISTS = ("off_device", "in_float")


def placement(engine: Engine[Any]) -> dict[str, Any]:
    """What an engine's operators compute in, and where, ready for JSON.

    `operators` counts them as {precision: {kind: count}}, `devices` by the vendor's names of devices,
    providers or delegates; `main_device` is the one that all are meant to run on. `off_device` lists those
    that run elsewhere, `in_float` the products that were meant to be INT8 and run in float.

    Raises what `Engine.operators` raises.
    """
    operators = engine.operators()
    main_device = engine.session.main_device
    return {
        "operators": by_precision(Counter((one.kind, one.precision) for one in operators)),
        "devices": dict(Counter(one.device for one in operators).most_common()),
        "main_device": main_device,
        "off_device": _listed(off_device(operators, main_device)),
        "in_float": _listed(one for one in operators if one.in_float),
    }


def by_precision(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """{(kind, precision): count} -> {precision: {kind: count}}, the most frequent kinds first."""
    table: dict[str, dict[str, int]] = {}
    for (kind, precision), count in sorted(counts.items(), key=lambda item: -item[1]):
        table.setdefault(precision, {})[kind] = count
    return table


def _listed(operators: Iterable[Operator]) -> list[dict[str, str]]:
    return [{**one._asdict(), "module": one.module} for one in operators]


def fallbacks(found: Mapping[str, Any]) -> list[str]:
    """Sentences on the operators that fell back, in what `placement` found; empty if none did."""
    lines, total = [], sum(found["devices"].values())
    if outside := _operators(found["off_device"]):
        places = ", ".join(sorted({one.device for one in outside}))
        lines.append(
            f"{len(outside)} of {total} operators run on {places}, not on {found['main_device']}: "
            f"{describe(outside)}"
        )
    if in_float := _operators(found["in_float"]):
        lines.append(
            f"{len(in_float)} products that were meant to be INT8 run in float: {describe(in_float)}"
        )
    return lines


def summary(found: Mapping[str, Any]) -> tuple[str, str]:
    """How many operators compute in each precision, and how many run on each device, as short texts."""
    precisions = {name: sum(counts.values()) for name, counts in found["operators"].items()}
    ordered = sorted(precisions.items(), key=lambda item: -item[1])
    return tuple(  # type: ignore[return-value]
        ", ".join(f"{name} {count}" for name, count in items) for items in (ordered, found["devices"].items())
    )


def check_placement(found: Mapping[str, Any]) -> None:
    """Raises ValueError for a dictionary that `placement` did not return."""
    try:
        counts = [
            *found["devices"].values(),
            *(n for one in found["operators"].values() for n in one.values()),
        ]
        texts = [
            found["main_device"],
            *(text for key in _LISTS for one in found[key] for text in one.values()),
        ]
        fallbacks(found)
        good = all(type(n) is int and n > 0 for n in counts) and all(type(text) is str for text in texts)
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"'placement' is {str(found)[:80]!r}")


def _operators(items: Sequence[Mapping[str, str]]) -> list[Operator]:
    return [Operator(**{field: item[field] for field in Operator._fields}) for item in items]
