"""Runs artifacts on saved pictures; as a program, on the ARM side: outputs.py OUT [PICTURES ARTIFACT]..."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from vitkit.runtimes import open_engine


def outputs(pictures: np.ndarray, artifact: Path) -> dict[str, np.ndarray]:
    """All outputs of an artifact for prepared pictures, one after another, each with the pictures first."""
    with open_engine(artifact, threads=1) as engine:
        name = engine.card.inputs[0].name
        runs = [engine.run({name: picture[None]}) for picture in pictures]
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


if __name__ == "__main__":
    asked = zip(sys.argv[2::2], sys.argv[3::2], strict=True)
    answers = {
        f"{number} {name}": values
        for number, (pictures, artifact) in enumerate(asked)
        for name, values in outputs(np.load(pictures), Path(artifact)).items()
    }
    np.savez(sys.argv[1], **answers)
