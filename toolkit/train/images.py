"""Training classifiers: images decoded once into memory, normalised and augmented a batch at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from vitkit.data.folder import Labelled, class_names, labelled_images
from vitkit.models import Labels, configure, run_card
from vitkit.runtimes.card import ImageSpec, ModelCard, sha256
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.image import read_image, resize_and_crop
from vitkit.train.config import TrainConfig
from vitkit.train.task import Batch


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
    return recolour(moved, config, generator)


def recolour(images: Tensor, config: TrainConfig, generator: Generator) -> Tensor:
    """Change contrast and brightness of each channel of normalised (B, 3, H, W) images."""
    contrast, brightness = (
        (torch.rand(len(images), 3, 1, 1, generator=generator) * 2 - 1) * config.jitter for _ in range(2)
    )
    return images * (1 + contrast).to(images.device) + brightness.to(images.device)


class ClassificationTask:
    """Image folders with a network that names their classes; see `Task`."""

    metric, unit = "top1", "top-1"

    def __init__(self, config: TrainConfig, data: Path) -> None:
        splits = find_splits(data)
        self.config, self.card = config, _card(config, splits)
        self.fingerprint = fingerprint(data, splits)
        self.images, self.val = (
            load_images(items, self.card.labels, self.card.image) for items in (splits.train, splits.val)
        )

    def __len__(self) -> int:
        return len(self.images)

    def trainable(self, network: nn.Module) -> nn.Module:
        """The network itself."""
        return network

    def batches(self, generator: Generator) -> Iterator[Batch]:
        """One pass over the training images; a batch holds pixels and class numbers."""
        images, count = self.images, math.ceil(len(self) / self.config.batch_size)
        for batch in torch.randperm(len(self), generator=generator).tensor_split(count):
            files = [images.files[i] for i in batch.tolist()]
            yield Batch(len(batch), files, (images.pixels[batch], images.targets[batch]))

    def losses(self, module: nn.Module, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """Cross-entropy of augmented images."""
        device = next(module.parameters()).device
        pixels, targets = (tensor.to(device) for tensor in batch.data)
        inputs = augment(normalise(pixels, self.card.image), self.config, generator)
        smoothing = self.config.label_smoothing
        return {"total": F.cross_entropy(module(inputs), targets, label_smoothing=smoothing)}

    def measure(self, network: nn.Module) -> dict[str, float]:
        """Top-1 accuracy in per cent on the validation images."""
        return {"top1": accuracy(network, self.val, self.card.image)}


def _card(config: TrainConfig, splits: Splits) -> ModelCard:
    classes = len(splits.classes)
    model = configure(config.model, {"num_classes": classes, **config.options})
    if model.num_classes != classes:
        raise BadRequest(f"num_classes is {model.num_classes}, but the data has {classes}; leave it out")
    card = run_card(config.model, model, Labels(splits.classes))
    counts = {"train_images": len(splits.train), "val_images": len(splits.val)}
    provenance = {**card.provenance, **trained(config), **counts}
    return replace(card, image=replace(card.image, crop_pct=config.crop_pct), provenance=provenance)


def trained(config: TrainConfig) -> dict[str, object]:
    """What a card's provenance says of a training."""
    return {"weights": "trained", "epochs": config.epochs, "seed": config.seed}


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, spec: ImageSpec, batch_size: int = 256) -> float:
    """Top-1 accuracy in per cent, on images as the card prepares them."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        logits = model(normalise(images.pixels[part].to(device), spec))
        right += int((logits.argmax(1).cpu() == images.targets[part]).sum())
    return 100 * right / len(images)
