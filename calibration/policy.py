"""The one policy of what stays float, matched against node names of any engine's graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def float_nodes(names: Iterable[str], float_modules: Sequence[str]) -> list[str]:
    """The names, out of `<module path>/<operator>` names, that a model's `float_modules` cover."""
    return [
        n
        for n in names
        if "/" in n and any(fnmatchcase(n.split("/")[0], pattern) for pattern in float_modules)
    ]
