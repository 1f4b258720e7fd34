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


def generated_photos(
    count: int, seed: int = 0, size: tuple[int, int] = (320, 400)
) -> list[NDArray[np.uint8]]:
    """Images with the broad statistics of photographs: smooth light, edges, grain; (H, W, 3) uint8 RGB."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    photos = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        waves = rng.normal(0, 4, (6, 3, 2)) / np.arange(1, 7)[:, None, None] ** 0.5
        phases, strengths = rng.uniform(0, 6.3, (6, 3)), rng.uniform(5, 30, (6, 3))
        angles = waves[..., 0, None, None] * y * 6.3 + waves[..., 1, None, None] * x * 6.3
        light = (strengths[..., None, None] * np.sin(angles + phases[..., None, None])).sum(0)
        photo = 128 + light.transpose(1, 2, 0)
        for _ in range(8):
            top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
            tall, wide = rng.integers(8, height // 2), rng.integers(8, width // 2)
            photo[top : top + tall, left : left + wide] += rng.normal(0, 40, 3)
        photo += rng.normal(0, 6, photo.shape)
        photos.append(photo.clip(0, 255).astype(np.uint8))
    return photos


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
