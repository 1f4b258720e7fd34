"""Calibration sets: which images, prepared how, and a fingerprint that says so."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import ImageSpec, sha256
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.image import prepare_batch, read_image
from vitkit.runtimes.listing import find_images

MINIMUM = 16
DEFAULT_COUNT = 128


@dataclass(frozen=True)
class CalibrationSet:
    """Images that stand for what the engine will see, all of them known to be readable.

    `files` are paths relative to `folder`, with their SHA-256 in `hashes`.
    """

    folder: Path
    files: tuple[str, ...]
    hashes: tuple[str, ...]
    seed: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of the images in their order; independent of where they lie."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()

    def inputs(self, image: ImageSpec, batch: int = 1) -> Iterator[NDArray[Any]]:
        """The images as engine inputs (batch, ...), through the card's own preparation.

        The last batch is filled up with images from the start, so that every one counts.
        """
        count = -(-len(self.files) // batch) * batch
        for start in range(0, count, batch):
            names = (self.files[i % len(self.files)] for i in range(start, start + batch))
            yield prepare_batch((read_image(self.folder / name) for name in names), image)

    def images(self) -> Iterator[NDArray[np.uint8]]:
        """The images as (H, W, 3) uint8 RGB."""
        for name in self.files:
            yield read_image(self.folder / name)

    def record(self, image: ImageSpec, method: str, kept_float: list[str]) -> str:
        """`calibration.json`: what was calibrated, on what and how."""
        body = {
            "method": method,
            "count": len(self.files),
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "image": asdict(image),
            "kept_float": kept_float,
            "files": [{"path": p, "sha256": h} for p, h in zip(self.files, self.hashes, strict=True)],
        }
        # In ASCII, so that names of files that are not UTF-8 can be written too.
        return json.dumps(body, indent=1) + "\n"


def calibration_set(folder: Path, count: int = DEFAULT_COUNT, seed: int = 0) -> CalibrationSet:
    """Sample `count` images below a folder (all, where it holds fewer), each decoded once as a proof.

    Found recursively, sorted by path, sampled with the seed, kept in sorted order.

    Raises BadRequest for a count under 16; BadInput where the folder is missing, holds fewer than 16
    different images, or a sampled file cannot be read: every such file is named.
    """
    if count < MINIMUM:
        raise BadRequest(f"--calib-count is {count}; calibration needs at least {MINIMUM} images")
    found = find_images(folder)
    if len(found) < MINIMUM:
        raise BadInput(f"{folder} holds {len(found)} images; calibration needs at least {MINIMUM}")
    chosen = found if len(found) <= count else random.Random(seed).sample(found, count)
    chosen.sort(key=lambda path: path.relative_to(folder).as_posix())
    unreadable = []
    for path in chosen:
        try:
            read_image(path)
        except BadInput as error:
            unreadable.append(str(error))
    if unreadable:
        raise BadInput(
            f"{len(unreadable)} of {len(chosen)} calibration images cannot be used: {'; '.join(unreadable)}. "
            "Remove or replace them"
        )
    hashes = tuple(sha256(path) for path in chosen)
    if len(set(hashes)) < MINIMUM:
        raise BadInput(
            f"the {len(chosen)} calibration images from {folder} are only {len(set(hashes))} different ones; "
            f"calibration needs at least {MINIMUM}"
        )
    files = tuple(path.relative_to(folder).as_posix() for path in chosen)
    return CalibrationSet(folder, files, hashes, seed)
