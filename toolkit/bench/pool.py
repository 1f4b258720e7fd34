"""The images that a bench draws its inputs from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitkit.bench.options import BenchOptions
from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.image import Image, generated_photos, read_image
from vitkit.runtimes.listing import find_images

GENERATED_SIZES = ((480, 640), (640, 480), (600, 800), (720, 1280))


class Pool(NamedTuple):
    """Images, (H, W, 3) uint8 RGB of any sizes, and where they are from, ready for JSON."""

    images: list[Image]
    description: dict[str, Any]


def make_pool(options: BenchOptions) -> Pool:
    """A sample of the folder `options.images`, or generated images; the same ones for the same seed.

    Raises BadInput if the folder holds no image that can be read.
    """
    size, seed = options.pool_size, options.seed
    if options.images is None:
        rng = np.random.default_rng([seed, 0])
        sizes = rng.choice(GENERATED_SIZES, size)
        images = [_generated(int(height), int(width), int(rng.integers(1 << 32))) for height, width in sizes]
        return Pool(images, {"source": "generated", "size": size, "seed": seed})
    files, images, unreadable = find_images(options.images), [], []
    for path in _shuffled(files, seed):
        if len(images) == size:
            break
        try:
            images.append(read_image(path))
        except BadInput as error:
            unreadable.append(str(error))
    if not images:
        reason = f": {unreadable[0]}" if unreadable else ""
        raise BadInput(
            f"none of the {len(files)} images below {options.images} can be read{reason}; "
            "name a folder of images, or none to measure on generated ones"
        )
    source = str(options.images)
    return Pool(images, {"source": source, "size": len(images), "seed": seed, "unreadable": len(unreadable)})


def pool_files(folder: Path, size: int, seed: int) -> list[Path]:
    """The files that a pool of `size` images is drawn from, and as many again in case some are unreadable.

    Raises BadInput if the folder holds no image.
    """
    return _shuffled(find_images(folder), seed)[: 2 * size]


def _shuffled(files: list[Path], seed: int) -> list[Path]:
    return [files[i] for i in np.random.default_rng([seed, 0]).permutation(len(files))]


def _generated(height: int, width: int, seed: int) -> Image:
    # Drawn at a quarter of the size: all of it takes sixteen times as long, and fine grain changes no speed.
    (small,) = generated_photos(1, seed, (height // 4, width // 4))
    return small.repeat(4, axis=0).repeat(4, axis=1)
