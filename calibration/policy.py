"""The one policy of what stays float, matched against node names of any engine's graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from vitkit.runtimes.errors import ExportFailed

# Modules that a message names.
_SHOWN = 12


def float_nodes(names: Iterable[str], float_modules: Sequence[str]) -> list[str]:
    """The names, out of `<module path>/<operator>` names, that a model's `float_modules` cover."""
    return [name for name in names if "/" in name and _matches(name, float_modules)]


def check_float_modules(names: Iterable[str], float_modules: Sequence[str]) -> None:
    """Refuse a pattern that covers none of the named nodes, since it would keep nothing float.

    Raises ExportFailed naming the pattern and module paths like it.
    """
    named = [name for name in names if "/" in name]
    paths = sorted({name.split("/")[0] for name in named})
    for pattern in float_modules:
        if any(_matches(name, [pattern]) for name in named):
            continue
        raise ExportFailed(
            f"the pattern {pattern!r} of what stays float matches no node of the graph; "
            f"{_advice(pattern, paths)}: correct or remove it (--keep-float, or the model's float_modules)"
        )


def _advice(pattern: str, paths: Sequence[str]) -> str:
    """What may have been meant by a pattern that matches none of the module paths."""
    if any(fnmatchcase(path, f"{pattern}.*") for path in paths):
        return f"'{pattern}.*' are the modules below it"
    near = get_close_matches(pattern, paths, 3, cutoff=0.5)
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN and not near else ""
    return f"{'like it are' if near else 'the modules are'} {', '.join(near or paths[:_SHOWN])}{more}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.split("/")[0], pattern) for pattern in patterns)
