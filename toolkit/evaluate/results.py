"""Results of evaluations and comparisons: their common form, and the JSON that `vitkit report` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vitkit.runtimes.card import Artifact, ModelCard

FORMAT = 1


class Table(NamedTuple):
    """A table for the terminal."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str | None = None


class Result(Protocol):
    """The figures of one evaluation, whatever the task."""

    @property
    def data(self) -> str:
        """The folder or the file of the truth."""

    @property
    def images(self) -> int:
        """How many images were evaluated."""

    @property
    def metric(self) -> str:
        """The name of the task's main figure, such as `top-1`."""

    @property
    def value(self) -> float:
        """The main figure, in per cent."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Options that change the figures."""

    def summary(self) -> dict[str, Any]:
        """All figures as plain numbers and dictionaries, for JSON."""

    def shown(self, title: str) -> list[str | Table]:
        """The figures as lines and tables for the terminal; `title` names the network."""


def identity(path: Path, card: ModelCard, machine: str | None) -> dict[str, Any]:
    """How a result names the network at `path`, identified by the hashes of its files, and where it ran.

    `machine` is a name in devices.toml, None for this machine. `size_bytes` is that of an engine, None for
    a run.
    """
    artifact = Artifact(path, card)
    return {
        "format": FORMAT,
        "network": str(path),
        "artifact": path.resolve().name,
        "name": card.name,
        "target": card.target,
        "precision": card.precision,
        "files": artifact.hashes(),
        "size_bytes": artifact.size_bytes if card.engine else None,
        "machine": machine,
    }


def to_json(path: Path, card: ModelCard, result: Result, machine: str | None = None) -> dict[str, Any]:
    """A result of the network at `path`; see `identity`."""
    return {
        **identity(path, card, machine),
        "data": result.data,
        "metric": result.metric,
        "value": result.value,
        **result.settings,
        **result.summary(),
    }


class Beside(NamedTuple):
    """One figure of a comparison with the float model, here and on a device, and of the two with each other.

    None if it was not measured. `inputs` is `golden` or `images`.
    """

    inputs: str
    figure: str
    here: float | None
    there: float | None
    between: float | None


def side_by_side(body: Mapping[str, Any]) -> list[Beside]:
    """The figures of what `verify --device --json` wrote; raises KeyError, TypeError or AttributeError."""
    places = [{check["set"]: _figures(check) for check in body[key]} for key in ("here", "checks", "between")]
    names = dict.fromkeys((inputs, name) for place in places for inputs in place for name in place[inputs])
    return [Beside(inputs, name, *(p.get(inputs, {}).get(name) for p in places)) for inputs, name in names]


def _figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a check by name, those one level below included; of a list, how long it is."""
    found: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, list):
            found[name] = len(value)
        elif isinstance(value, dict):
            found |= {f"{name} {inner}": number for inner, number in value.items() if _is_number(number)}
        elif _is_number(value):
            found[name] = value
    return found


def _is_number(value: object) -> bool:
    # numpy's float64 is a float too.
    return isinstance(value, (int, float)) and not isinstance(value, bool)
