"""What is kept of an evaluation, as JSON: `vitkit evaluate --json` writes it, `vitkit report` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitkit.evaluate.accuracy import Accuracy
from vitkit.evaluate.panoptic_quality import QualityReport
from vitkit.runtimes.card import Artifact, ModelCard

FORMAT = 1


def to_json(
    path: Path, card: ModelCard, data: str, found: Accuracy | QualityReport, **options: Any
) -> dict[str, Any]:
    """What was measured on which network, told by the hashes of its files, and on which data.

    `size_bytes` is that of an engine, None for a run. `options` are the settings that change the figures.
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
        "data": data,
        **options,
        **found.summary(),
    }
