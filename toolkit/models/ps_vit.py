"""PS-ViT: image classification by progressive sampling (thesis chapter 3).

Points are (y, x) in feature-map pixels, row-major as in equation 3.2. The authors' code lists them
column-major; the network is permutation-equivariant over points, so only dumps of points differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PSViTConfig:
    """Architecture of one PS-ViT (thesis table 2); the defaults are PS-ViT-Ti/14.

    `qk_scale` is the softmax scale's base: `head_dim` (the authors' default) or `dim` (what their
    factories set together with the released checkpoints).
    """

    num_classes: int = 1000
    image_size: int = 224
    n: int = 14
    dim: int = 192
    heads: int = 3
    iterations: int = 4
    encoder_layers: int = 8
    mlp_ratio: int = 3
    stem_width: int = 64
    stem_mid: int = 192
    share: bool = False
    qk_scale: str = "head_dim"
    dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("num_classes", "image_size", "n", "dim", "heads")}
        for name, value in {**numbers, "iterations": self.iterations}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.encoder_layers < 0:
            raise ValueError(f"encoder_layers is {self.encoder_layers}; it must not be negative")
        if self.qk_scale not in ("head_dim", "dim"):
            raise ValueError(f"qk_scale is {self.qk_scale!r}; it must be 'head_dim' or 'dim'")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 residual block whose inner width is fixed rather than a quarter of the output."""

    def __init__(self, width_in: int, inner: int, width_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.downsample: nn.Module = nn.Identity()
        if width_in != width_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class Attention(nn.Module):
    """Multi-head self-attention, equation 3.7; qkv has no bias."""

    def __init__(self, config: PSViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.dim // config.heads
        self.scale = (config.dim if config.qk_scale == "dim" else self.head_dim) ** -0.5
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        # Written out, not F.scaled_dot_product_attention: engines fuse this form, and it traces to a
        # third of the nodes.
        q, k, v = (
            part.reshape(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1)
        return self.dropout(self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer encoder layer: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, config: PSViTConfig, drop_path: float) -> None:
        super().__init__()
        hidden = config.dim * config.mlp_ratio
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.dim),
            nn.Dropout(config.dropout),
        )
        self.drop_path: nn.Module = nn.Identity()
        if drop_path:
            # Imported here: timm takes two seconds, and only training drops paths.
            from vitkit.torchvision_shim import timm

            self.drop_path = timm.layers.DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def initial_points(n: int, height: int, width: int) -> Tensor:
    """Regular grid of equation 3.2: (n*n, 2) as (y, x) in pixels of a (height, width) feature map."""
    steps = torch.arange(n, dtype=torch.float32) + 0.5
    return torch.cartesian_prod(steps * (height / n), steps * (width / n))


class Sample(nn.Module):
    """Bilinear sampling, equation 3.3; points outside the map read zeros, as the authors' kernel does."""

    def forward(self, features: Tensor, points: Tensor) -> Tensor:
        """(B, C, H, W) features at (B, L, 2) points in pixels -> (B, L, C)."""
        height, width = features.shape[2:]
        size = torch.tensor([height - 1, width - 1], dtype=points.dtype, device=points.device)
        grid = (points * (2 / size) - 1).flip(-1).unsqueeze(2)
        tokens = F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        return tokens.squeeze(3).transpose(1, 2)


def sample_regular_grid(features: Tensor, points: Tensor, n: int, sample: Sample) -> Tensor:
    """Tokens at `initial_points` (1, n*n, 2); a strided slice where these fall on whole pixels."""
    height, width = features.shape[2:]
    step_y, step_x = height // n, width // n
    if height == n * step_y and width == n * step_x and step_y % 2 == 0 and step_x % 2 == 0:
        return features[:, :, step_y // 2 :: step_y, step_x // 2 :: step_x].flatten(2).transpose(1, 2)
    return sample(features, points.expand(len(features), -1, -1))


class ProgressiveSampler(nn.Module):
    """Progressive sampling module, equations 3.1 to 3.5."""

    def __init__(self, config: PSViTConfig, drop_paths: list[float]) -> None:
        super().__init__()
        self.n = config.n
        self.iterations = config.iterations
        self.pos_layer = nn.Linear(2, config.dim)
        count = 1 if config.share else config.iterations
        self.layers = nn.ModuleList(EncoderLayer(config, drop_paths[i]) for i in range(count))
        self.offset_layers = nn.ModuleList(nn.Linear(config.dim, 2) for _ in range(config.iterations - 1))
        self.sample = Sample()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> tokens (B, n*n, C) and the points of every iteration (B, T, n*n, 2)."""
        batch, _, height, width = features.shape
        size = torch.tensor([height, width], dtype=features.dtype, device=features.device)
        points = initial_points(self.n, height, width).to(features).unsqueeze(0)
        tokens = sample_regular_grid(features, points, self.n, self.sample)
        tokens = self.layers[0](tokens + self.pos_layer(points / size))
        trace = [points.expand(batch, -1, -1)]
        for t in range(1, self.iterations):
            offsets = self.offset_layers[t - 1](tokens)
            sampled = self.sample(features, points + offsets)
            # As the authors' code: the stored location moves by the detached offset, so that each offset
            # learns only through the very next sampling.
            points = points + offsets.detach()
            layer = self.layers[min(t, len(self.layers) - 1)]
            tokens = layer(sampled + self.pos_layer(points / size) + tokens)
            trace.append(points)
        return tokens, torch.stack(trace, dim=1)


class PSViT(nn.Module):
    """PS-ViT (thesis figure 4): convolutional stem, progressive sampling, encoder, class-token head."""

    # What stays float in every engine, as patterns over module paths: all that makes the coordinates at
    # which the next iteration samples. A rounding there reads the wrong pixels.
    float_scopes = ("sampler", "sampler.offset_layers.*", "sampler.pos_layer", "sampler.sample")
    output_names = ("logits", "points")
    # A feature-map pixel p is centred on image pixel 4p: two strides of 2 with symmetric padding.
    stride = 4

    def __init__(self, config: PSViTConfig) -> None:
        super().__init__()
        self.config = config
        depth = config.iterations + config.encoder_layers
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.stem = nn.Sequential(
            nn.Conv2d(3, config.stem_width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(config.stem_width),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            Bottleneck(config.stem_width, config.stem_width, config.stem_mid),
            Bottleneck(config.stem_mid, config.stem_width, config.dim),
        )
        self.sampler = ProgressiveSampler(config, rates)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.encoder = nn.Sequential(*(EncoderLayer(config, rate) for rate in rates[config.iterations :]))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for layer in self.sampler.offset_layers:
            nn.init.zeros_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) images -> logits (B, num_classes)."""
        return self.deploy(images)[0]

    def deploy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What an engine returns: logits (B, classes), and points (B, T, n*n, 2) in image pixels."""
        tokens, points = self.sampler(self.stem(images))
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.head(self.norm(self.encoder(tokens)[:, 0])), points * self.stride
