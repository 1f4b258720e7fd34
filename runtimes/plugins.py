"""Tables of rows (targets, runtimes, tasks) that other people's packages may add to."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

from vitkit.runtimes.errors import BadRequest, VitkitError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_log = logging.getLogger(__name__)

Row = TypeVar("Row")


class Rows(Mapping[str, Row]):
    """Rows by name: `own` are vitkit's, the others those of installed packages.

    A package adds a row by an entry point of `group`, which names an object of type `kind`. Entry points are
    read only when a name is looked up that is not in `own`, or when all names are listed. A row that cannot
    be loaded, has another type, or has a name that is taken is skipped with a warning.
    """

    def __init__(self, group: str, kind: type[Row], own: Mapping[str, Row]) -> None:
        self.group = group
        self.own = dict(own)
        self._kind = kind
        self._loaded: dict[str, Row | None] = {}

    def __getitem__(self, name: str) -> Row:
        row = self.own.get(name) or self._plugin(name)
        if row is None:
            raise KeyError(name)
        return row

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (name for name in self._entry_points if self._plugin(name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def module(self, name: str, field: str) -> Any:
        """The module whose dotted name is in a field of a row.

        Raises KeyError for an unknown name, BadRequest for a plugin's module that cannot be imported.
        """
        path = getattr(self[name], field)
        if name in self.own:
            return import_module(path)
        try:
            return import_module(path)
        except VitkitError:
            raise
        # Another package's module may raise anything.
        except Exception as error:
            (point,) = self._entry_points[name]
            raise BadRequest(
                f"{_described(point)} has {path!r} as its {field}, which cannot be imported: "
                f"{type(error).__name__}: {error}; {_remedy(point)}"
            ) from error

    @cached_property
    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        """The group's entry points by name; two of one name are of two packages."""
        from importlib.metadata import entry_points

        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            found.setdefault(point.name, []).append(point)
        return found

    def _plugin(self, name: str) -> Row | None:
        """The row of a plugin; None if there is none, and after a warning if it cannot be used."""
        if name not in self._loaded and name in self._entry_points:
            points = self._entry_points[name]
            row, problem = self._load(points)
            if problem:
                remedies = " or ".join(map(_remedy, points))
                _log.warning("%s is skipped: %s; %s", _described(*points), problem, remedies)
            self._loaded[name] = row
        return self._loaded.get(name)

    def _load(self, points: list[EntryPoint]) -> tuple[Row | None, str | None]:
        """A plugin's row, or why it cannot be used."""
        if points[0].name in self.own:
            return None, f"the name {points[0].name!r} is vitkit's own"
        if len(points) > 1:
            return None, f"{len(points)} packages have the name {points[0].name!r}"
        try:
            row = points[0].load()
        # Another package's module may raise anything, and may end the process where it is no module.
        except (Exception, SystemExit) as error:
            return None, f"{type(error).__name__}: {error}"
        problem = self._type_problem(row)
        return (None, problem) if problem else (row, None)

    def _type_problem(self, row: object) -> str | None:
        """Which part of a row has another type than its kind declares; None if all fit."""
        wanted = f"{self._kind.__module__}.{self._kind.__qualname__}"
        if not isinstance(row, self._kind):
            return f"it is a {type(row).__name__}; it must be a {wanted}"
        for field, hint in get_type_hints(self._kind).items():
            kind = hint if get_origin(hint) in (None, UnionType) else get_origin(hint)
            if not isinstance(value := getattr(row, field), kind):
                shown = hint.__name__ if isinstance(hint, type) else hint
                return f"its {field} is {value!r}; {wanted} wants {shown}"
        return None


def _described(*points: EntryPoint) -> str:
    """The plugin's name, packages, group and objects, for messages."""
    origins = " and ".join(
        f"{point.dist.name} {point.dist.version} ({point.value})" if point.dist else point.value
        for point in points
    )
    return f"the plugin {points[0].name!r} of {points[0].group} from {origins}"


def _remedy(point: EntryPoint) -> str:
    name = point.dist.name if point.dist else "PACKAGE"
    return f"upgrade it with: pip install --upgrade {name}, or remove it with: pip uninstall {name}"
