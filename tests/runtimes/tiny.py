"""Artifacts of a few bytes, for what does not depend on the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vitkit.doctor import _TINY
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec, write_card

IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def write_tiny(folder: Path, target: str, content: bytes | None = None, **changes) -> Path:
    """An artifact that flattens a picture of 2 x 2 pixels into its logits; or with another graph."""
    file, graph = _TINY[target]
    fields = {
        "name": "tiny",
        "task": "classification",
        "target": target,
        "precision": "fp32",
        "inputs": (TensorSpec("x", (1, 2, 2, 3), "uint8"),),
        "outputs": (TensorSpec("logits", (1, 12), "float32"),),
        "image": ImageSpec(size=(2, 2), crop_pct=1.0),
        "engine": file,
        "files": {file: None},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(graph if content is None else content)
    write_card(ModelCard(**{**fields, **changes}), folder)
    return folder
