"""What is inside an artifact: its card, its files, its operators by precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vitkit.runtimes.card import Artifact, read_artifact
from vitkit.runtimes.errors import MissingBackend

Operators = Counter[tuple[str, str]]


def inspect(path: Path) -> dict[str, Any]:
    """Card, file sizes in bytes, and operators as {precision: {operator: count}}. Raises BadArtifact."""
    artifact = read_artifact(path)
    card = artifact.card
    table: dict[str, dict[str, int]] = {}
    for (operator, precision), count in sorted(_operators(artifact).items(), key=lambda item: -item[1]):
        table.setdefault(precision, {})[operator] = count
    return {
        "name": card.name,
        "task": card.task,
        "target": card.target,
        "precision": card.precision,
        "inputs": [str(spec) for spec in card.inputs],
        "outputs": [str(spec) for spec in card.outputs],
        "image": card.image.__dict__,
        "classes": len(card.labels),
        "options": dict(card.options),
        "provenance": dict(card.provenance),
        "files": {name: (path / name).stat().st_size for name in card.files},
        "operators": table,
    }


def _operators(artifact: Artifact) -> Operators:
    if artifact.engine_path.suffix == ".onnx":
        try:
            from vitkit.exporters.graph import operators
        except ImportError as error:
            raise MissingBackend("onnx", "export", error) from None
        return operators(artifact.engine_path)
    from vitkit.runtimes.engine import open_engine

    with open_engine(artifact.path) as engine:
        return engine.operators()
