"""Golden pairs: a few inputs with the float reference's outputs, to check an artifact where it lands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import Artifact
from vitkit.runtimes.errors import BadArtifact

GOLDEN_FILE = "golden.npz"
# One of panoptic segmentation: its mask logits are megabytes.
_COUNTS = {"panoptic": 1}
_COUNT = 4


def count(task: str) -> int:
    """How many golden pairs an artifact of a task carries."""
    return _COUNTS.get(task, _COUNT)


def write_golden(
    folder: Path, inputs: NDArray[Any], outputs: dict[str, NDArray[Any]], name: str = "image"
) -> None:
    """Save prepared inputs (N, ...) and the reference's outputs as `golden.npz`."""
    arrays = {f"input.{name}": inputs, **{f"output.{key}": value for key, value in outputs.items()}}
    np.savez_compressed(folder / GOLDEN_FILE, allow_pickle=False, **arrays)


def read_golden(artifact: Artifact) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Prepared inputs and the reference's outputs of an artifact; raises BadArtifact."""
    path = artifact.path / GOLDEN_FILE
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    # numpy raises a dozen types on hostile bytes, also for a lone array where an archive belongs.
    except Exception as error:
        raise BadArtifact(f"{path} cannot be read: {error}") from None
    outputs = {name.removeprefix("output."): arrays[name] for name in arrays if name.startswith("output.")}
    key = f"input.{artifact.card.inputs[0].name}"
    if key not in arrays or set(outputs) != {spec.name for spec in artifact.card.outputs}:
        raise BadArtifact(f"{path} holds {', '.join(arrays)}, which are not this engine's inputs and outputs")
    for name, spec in [
        (key, artifact.card.inputs[0]),
        *((f"output.{s.name}", s) for s in artifact.card.outputs),
    ]:
        found = arrays[name]
        good = found.dtype == spec.dtype and found.ndim == len(spec.shape) and len(found) == len(arrays[key])
        if not good or found.shape[1:] != spec.shape[1:] or not len(found):
            raise BadArtifact(f"{path}: {name} is {found.dtype} {list(found.shape)}, the card says {spec}")
    return arrays[key], outputs
