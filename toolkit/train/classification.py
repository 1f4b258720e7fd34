"""Training classifiers on image folders or shards, with timm's augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from vitkit.evaluate import accuracy
from vitkit.models import Labels, configure, run_card
from vitkit.runtimes.card import ImageSpec, ModelCard
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.image import prepare
from vitkit.torchvision_shim import timm
from vitkit.train.config import TrainConfig, training_provenance
from vitkit.train.distill import Teacher, distillation_loss
from vitkit.train.image_source import ImageSplits, find_images
from vitkit.train.mixing import AttentionWatch, Mixed, mix, soft_targets, transmix_share
from vitkit.train.readable import check_readable
from vitkit.train.seeds import seeded
from vitkit.train.shards import Shard


class ClassificationTraining:
    """Image folders with a network that names their classes; see `TrainingTask`."""

    metric, unit = accuracy.METRIC, accuracy.UNIT

    def __init__(self, config: TrainConfig, data: str | Path) -> None:
        splits = find_images(data, config)
        self.config, self.card = config, _card(config, splits)
        self.fingerprint = splits.digest
        self.images, self.val = splits.train, splits.val
        self.files, self.chunks = self.images.files, self.images.chunks
        self.notes = list(splits.notes)
        self.change = transform(config, self.card.image)

    def sample(self, index: int, seed: int) -> tuple[Tensor, int]:
        """A training image, normalised and augmented (3, H, W), and its class number."""
        image, target = self.images[index]
        with seeded(seed):
            return self.change(Image.fromarray(image)), target

    def expect(self, order: Sequence[int]) -> None:
        """The training images of the epoch to come."""
        self.images.expect(order)

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
        """Samples -> images (B, 3, H, W) and class numbers (B,)."""
        images = torch.stack([image for image, _ in samples])
        return images.contiguous(memory_format=torch.channels_last), torch.tensor([n for _, n in samples])

    def trainable(self, network: nn.Module) -> nn.Module:
        """The network itself."""
        self.watch = AttentionWatch(network) if self.config.transmix else None
        self.teacher = Teacher(self.config.teacher, self.card) if self.config.teacher else None
        return network

    def losses(self, module: nn.Module, data: tuple[Tensor, ...], generator: Generator) -> dict[str, Tensor]:
        """Cross-entropy of mixed images, and the distance to a teacher where there is one."""
        images, targets = data
        mixed = mix(images, self.config, generator)
        logits, share = self._answer(module, mixed)
        wanted = soft_targets(targets, len(self.card.labels), share, self.config.label_smoothing)
        label = F.cross_entropy(logits, wanted)
        if self.teacher is None:
            return {"total": label}
        told, weight = self.teacher.logits(mixed.images), self.config.distill_weight
        teacher = distillation_loss(logits, told, self.config.distill, self.config.temperature)
        return {"total": (1 - weight) * label + weight * teacher, "label": label, "teacher": teacher}

    def _answer(self, module: nn.Module, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Logits, and the share of the partners' labels."""
        logits: Tensor = module(mixed.images)
        if self.watch is None or mixed.box is None:
            return logits, mixed.share
        return logits, transmix_share(mixed, self.watch.attended(len(logits)))

    @torch.no_grad()
    def measure(self, network: nn.Module, shard: Shard, batch_size: int = 128) -> dict[str, float]:
        """Top-1 accuracy in per cent on the validation images, prepared as the card says.

        Those that cannot be read are left out and told in `notes`; raises BadInput for over one in a hundred.
        """
        device, part = next(network.parameters()).device, shard.of(range(len(self.val)))
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        lost: list[str] = []
        for start in range(0, len(part), batch_size):
            images, targets = self._prepared(part[start : start + batch_size], lost)
            if images:
                best = network(torch.from_numpy(np.stack(images)).to(device)).argmax(1)
                counts[0] += (best == torch.tensor(targets, device=device)).sum()
        counts[1] = len(part) - len(lost)
        right, read = shard.add(counts).tolist()
        check_readable(len(self.val) - round(read), len(self.val), "validation images", lost)
        told = [f"validation image left out: {reason}" for reason in lost]
        self.notes += [note for note in told if note not in self.notes]
        return {self.metric: 100 * right / read}

    def _prepared(self, numbers: Sequence[int], lost: list[str]) -> tuple[list[NDArray[Any]], list[int]]:
        """Validation images as inputs, and their class numbers; why others cannot be read goes to `lost`."""
        images, targets = [], []
        for number in numbers:
            try:
                image, target = self.val[number]
                images.append(prepare(image, self.card.image))
                targets.append(target)
            except BadInput as error:
                lost.append(str(error))
        return images, targets


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


def _card(config: TrainConfig, splits: ImageSplits) -> ModelCard:
    classes = len(splits.classes)
    model = configure(config.model, {"num_classes": classes, **config.options})
    if model.num_classes != classes:
        raise BadRequest(f"num_classes is {model.num_classes}, but the data has {classes}; leave it out")
    card = run_card(config.model, model, Labels(splits.classes))
    counts = {"train_images": len(splits.train), "val_images": len(splits.val)}
    provenance = {**card.provenance, **training_provenance(config), **counts}
    return replace(card, image=replace(card.image, crop_pct=config.crop_pct), provenance=provenance)
