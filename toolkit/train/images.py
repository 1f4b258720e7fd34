"""Training images: decoded once into memory, normalised and augmented a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from vitkit.data.folder import Labelled, class_names, labelled_images
from vitkit.runtimes.card import ImageSpec, sha256
from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.image import read_image, resize_and_crop
from vitkit.train.config import TrainConfig


@dataclass(frozen=True)
class ImageSet:
    """Images in memory: pixels (N, H, W, 3) uint8 RGB, class numbers (N,) int64, and their files."""

    pixels: Tensor
    targets: Tensor
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Splits:
    """The files of `DIR/train` and `DIR/val`, and the classes of both."""

    train: list[Labelled]
    val: list[Labelled]
    classes: tuple[str, ...]


def find_splits(data: Path) -> Splits:
    """List the image folders `data/train` and `data/val`.

    Raises BadInput where one is missing or malformed, or `val` holds a class that `train` does not.
    """
    train, val = labelled_images(data / "train"), labelled_images(data / "val")
    classes = class_names(train)
    if unknown := sorted(set(class_names(val)) - set(classes)):
        raise BadInput(f"{data / 'val'} holds classes that {data / 'train'} lacks: {', '.join(unknown)}")
    return Splits(train, val, classes)


def fingerprint(data: Path, splits: Splits) -> str:
    """Hex SHA-256 over the names and contents of all images: changes with every change of the data."""
    digest = hashlib.sha256()
    for path, _ in splits.train + splits.val:
        digest.update(f"{path.relative_to(data).as_posix()}\n{sha256(path)}\n".encode())
    return digest.hexdigest()


def load_images(items: Sequence[Labelled], classes: Sequence[str], spec: ImageSpec) -> ImageSet:
    """Decode and prepare images as the card says; raises BadInput for a file that is no image."""
    pixels = np.empty((len(items), *spec.size, 3), np.uint8)
    for row, (path, _) in zip(pixels, items, strict=True):
        row[:] = resize_and_crop(read_image(path), spec)
    numbers = {name: number for number, name in enumerate(classes)}
    targets = torch.tensor([numbers[name] for _, name in items])
    return ImageSet(torch.from_numpy(pixels), targets, tuple(path for path, _ in items))


def normalise(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in channels-last memory, as `runtimes.image.prepare`."""
    std = torch.tensor(spec.std, device=pixels.device)
    mean = torch.tensor(spec.mean, device=pixels.device)
    return (pixels.float() * (torch.tensor(1 / 255) / std) - mean / std).permute(0, 3, 1, 2)


def augment(images: Tensor, config: TrainConfig, generator: Generator) -> Tensor:
    """Mirror, turn, zoom, shift and recolour normalised (B, 3, H, W) images, each in its own way."""
    count = len(images)

    def spread(limit: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * limit

    mirror = 1 - 2 * (torch.rand(count, generator=generator) < config.flip).float()
    angle, scale = torch.deg2rad(spread(config.rotate)), 1 + spread(config.zoom)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # Twice the shift: affine_grid counts from -1 to 1.
    right, down = spread(2 * config.shift), spread(2 * config.shift)
    rows = [torch.stack([mirror * cos, -sin, right], 1), torch.stack([mirror * sin, cos, down], 1)]
    theta = torch.stack(rows, 1).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    contrast, brightness = 1 + spread(config.jitter, 3, 1, 1), spread(config.jitter, 3, 1, 1)
    return moved * contrast.to(images.device) + brightness.to(images.device)
