"""Decoded images, kept in memory where they fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

from vitkit.runtimes.errors import BadInput

_T = TypeVar("_T")
_MB = 2**20


class _Loaded(Sequence[_T], Generic[_T]):
    """Items decoded when asked for, or before; asking for one that cannot be read raises BadInput."""

    def __init__(self, names: Sequence[Any], load: Callable[[Any], _T]) -> None:
        self.names, self.load = names, load
        self.kept: list[_T | BadInput] = []

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> _T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...

    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not self.kept:
            return self.load(self.names[index])
        found = self.kept[index]
        if isinstance(found, BadInput):
            raise found
        return found

    def keep(self) -> None:
        """Decode all of them now."""
        self.kept = [self._tried(name) for name in self.names]

    def _tried(self, name: Any) -> _T | BadInput:
        try:
            return self.load(name)
        except BadInput as error:
            return error


def in_memory(
    names: Sequence[Any], load: Callable[[Any], _T], limit_mb: int, size: Callable[[_T], int]
) -> Sequence[_T]:
    """What `load` makes of every name: decoded now where all fit into `limit_mb`, else when asked for.

    `size` counts a result's bytes; the first one that can be read speaks for all.
    """
    items = _Loaded(names, load)
    first = next((found for found in map(items._tried, names[:100]) if not isinstance(found, BadInput)), None)
    if first is not None and size(first) * len(names) <= limit_mb * _MB:
        items.keep()
    return items
