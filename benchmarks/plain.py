"""PS-ViT as one would write it from the paper: timm's blocks, grid_sample, tokens as (B, L, C).

The baseline of benchmarks/engines.py, exported by torch's defaults; no code of vitkit's own model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.models.ps_vit import PSViTConfig, regular_grid
from vitkit.torchvision_shim import timm

Block = timm.models.vision_transformer.Block


def conv_bn(width_in: int, width_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width_out))


class Residual(nn.Module):
    def __init__(self, width_in: int, inner: int, width_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(width_in, inner, 1),
            nn.ReLU(),
            conv_bn(inner, inner, 3),
            nn.ReLU(),
            conv_bn(inner, width_out, 1),
        )
        self.skip = conv_bn(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class PlainPSViT(nn.Module):
    """Logits only."""

    def __init__(self, c: PSViTConfig) -> None:
        super().__init__()
        self.config = c
        self.stem = nn.Sequential(
            conv_bn(3, c.stem_width, 7, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            Residual(c.stem_width, c.stem_width, c.stem_mid),
            Residual(c.stem_mid, c.stem_width, c.dim),
        )
        self.position = nn.Linear(2, c.dim)
        count = 1 if c.share else c.iterations
        self.sampling = nn.ModuleList(Block(c.dim, c.heads, c.mlp_ratio) for _ in range(count))
        self.offsets = nn.ModuleList(nn.Linear(c.dim, 2) for _ in range(c.iterations - 1))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.blocks = nn.Sequential(*(Block(c.dim, c.heads, c.mlp_ratio) for _ in range(c.encoder_layers)))
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, c.num_classes)
        for layer in self.offsets:
            nn.init.normal_(layer.weight, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        size = torch.tensor(features.shape[2:])
        points = regular_grid(self.config.n, *features.shape[2:])[None]
        tokens = None
        for t in range(self.config.iterations):
            grid = (2 * points / (size - 1) - 1).flip(-1).unsqueeze(2)
            sampled = F.grid_sample(features, grid, align_corners=True).squeeze(3).transpose(1, 2)
            x = sampled + self.position(points / size)
            tokens = self.sampling[min(t, len(self.sampling) - 1)](x if tokens is None else x + tokens)
            if t < len(self.offsets):
                points = points + self.offsets[t](tokens)
        x = self.blocks(torch.cat([self.cls_token, tokens], dim=1))
        return self.head(self.norm(x)[:, 0])
