"""Pixels of training images on the device that trains: normalised, and their colours changed."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from vitkit.runtimes.card import ImageSpec
from vitkit.train.config import TrainConfig


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
