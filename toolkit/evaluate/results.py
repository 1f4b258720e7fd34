"""Results of evaluations: their common form, and the JSON that `vitkit report` reads."""

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


def to_json(path: Path, card: ModelCard, result: Result) -> dict[str, Any]:
    """A result with the network at `path`, identified by the hashes of its files.

    `size_bytes` is that of an engine, None for a run.
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
        "data": result.data,
        "metric": result.metric,
        "value": result.value,
        **result.settings,
        **result.summary(),
    }
