"""Training classifiers on image folders, with timm's augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from vitkit.data.folder import Labelled, class_names, labelled_images
from vitkit.models import Labels, configure, run_card
from vitkit.runtimes.card import ImageSpec, ModelCard
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.image import prepare, read_image
from vitkit.torchvision_shim import timm
from vitkit.train.config import TrainConfig
from vitkit.train.memory import in_memory
from vitkit.train.mixing import AttentionWatch, Mixed, mix, soft_targets, transmix_share
from vitkit.train.seeds import seeded
from vitkit.train.shards import Shard


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
    """Hex SHA-256 over the names and sizes of all images; reading all of ImageNet would take minutes."""
    return listing_sha256(data, [path for path, _ in splits.train + splits.val])


def listing_sha256(folder: Path, paths: Sequence[Path]) -> str:
    """Hex SHA-256 over the names and sizes of files below a folder."""
    lines = [f"{path.relative_to(folder).as_posix()}\n{path.stat().st_size}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def normalise(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in channels-last memory, as `runtimes.image.prepare`."""
    std = torch.tensor(spec.std, device=pixels.device)
    mean = torch.tensor(spec.mean, device=pixels.device)
    return (pixels.float() * (torch.tensor(1 / 255) / std) - mean / std).permute(0, 3, 1, 2)


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
        numbers = {name: number for number, name in enumerate(self.card.labels)}
        self.files: Sequence[Path] = [path for path, _ in splits.train]
        self.targets = [numbers[name] for _, name in splits.train]
        self.val = [(path, numbers[name]) for path, name in splits.val]
        self.photos = in_memory(
            self.files,
            lambda path: Image.fromarray(read_image(path)),
            config.cache_mb,
            lambda photo: 3 * photo.width * photo.height,
        )
        self.change = transform(config, self.card.image)

    def sample(self, index: int, seed: int) -> tuple[Tensor, int]:
        """A training image, normalised and augmented (3, H, W), and its class number."""
        photo = self.photos[index]
        with seeded(seed):
            return self.change(photo), self.targets[index]

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
        """Samples -> images (B, 3, H, W) and class numbers (B,)."""
        images = torch.stack([image for image, _ in samples])
        return images.contiguous(memory_format=torch.channels_last), torch.tensor([n for _, n in samples])

    def trainable(self, network: nn.Module) -> nn.Module:
        """The network itself."""
        self.watch = AttentionWatch(network) if self.config.transmix else None
        return network

    def losses(self, module: nn.Module, data: tuple[Tensor, ...], generator: Generator) -> dict[str, Tensor]:
        """Cross-entropy of mixed images."""
        images, targets = data
        mixed = mix(images, self.config, generator)
        logits, share = self._answer(module, mixed)
        wanted = soft_targets(targets, len(self.card.labels), share, self.config.label_smoothing)
        return {"total": F.cross_entropy(logits, wanted)}

    def _answer(self, module: nn.Module, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Logits, and the share of the partners' labels."""
        if self.watch is None or mixed.box is None:
            return module(mixed.images), mixed.share
        with self.watch.watching() as seen:
            logits: Tensor = module(mixed.images)
        return logits, transmix_share(mixed, self.watch.attended(seen, len(logits)))

    @torch.no_grad()
    def measure(self, network: nn.Module, shard: Shard, batch_size: int = 128) -> dict[str, float]:
        """Top-1 accuracy in per cent on the validation images, prepared as the card says."""
        device, part = next(network.parameters()).device, shard.of(self.val)
        right = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, len(part), batch_size):
            items = part[start : start + batch_size]
            images = np.stack([prepare(read_image(path), self.card.image) for path, _ in items])
            best = network(torch.from_numpy(images).to(device)).argmax(1)
            right += (best == torch.tensor([number for _, number in items], device=device)).sum()
        return {"top1": 100 * shard.add(right).item() / len(self.val)}


def transform(config: TrainConfig, spec: ImageSpec) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: random crop, flip, colour or RandAugment, normalise, random erasing."""
    made: Callable[[Image.Image], Tensor] = timm.data.create_transform(
        input_size=(3, *spec.size),
        is_training=True,
        scale=(config.crop_min, 1.0),
        hflip=config.flip,
        color_jitter=config.jitter,
        auto_augment=config.randaugment or None,
        interpolation=config.interpolation,
        mean=spec.mean,
        std=spec.std,
        re_prob=config.erase,
        re_mode="pixel",
    )
    return made


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
