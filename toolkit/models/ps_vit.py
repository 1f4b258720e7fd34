"""PS-ViT: image classification by progressive sampling (thesis chapter 3).

Points are (y, x) in feature-map pixels, row-major as in equation 3.2. The authors' code lists them
column-major; the network is permutation-equivariant over points, so only dumps of points differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vitkit.models.family import CardParts, Labels, Layout, Model, ModelConfig, Place
from vitkit.runtimes.card import ImageSpec, TensorSpec

# Two feature-map pixels a side: with one, there is nothing to interpolate between.
MIN_IMAGE_SIZE = 5
MAX_OPTION = 10_000


@dataclass(frozen=True)
class PSViTConfig(ModelConfig):
    """Architecture of one PS-ViT (thesis table 2); the defaults are PS-ViT-Ti/14.

    `qk_scale` is the softmax scale's base: `head_dim` (the authors' default) or `dim` (what their
    factories set together with the released checkpoints). `stride` is the image pixels to a pixel of the
    feature map: 4 as published; 2 and 1, with a 3x3 convolution first, are ours for small images.
    """

    n: int = 14
    dim: int = 192
    heads: int = 3
    iterations: int = 4
    encoder_layers: int = 8
    mlp_ratio: int = 3
    stem_width: int = 64
    stem_mid: int = 192
    stride: int = 4
    share: bool = False
    qk_scale: str = "head_dim"
    dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        least = {"encoder_layers": 0, "image_size": MIN_IMAGE_SIZE}
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and not least.get(field.name, 1) <= value <= MAX_OPTION:
                raise ValueError(
                    f"{field.name} is {value}; it must be {least.get(field.name, 1)} to {MAX_OPTION}"
                )
        for name, value in {"dropout": self.dropout, "drop_path": self.drop_path}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 0 and under 1")
        if self.stride not in (1, 2, 4):
            raise ValueError(f"stride is {self.stride}; it must be 1, 2 or 4")
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
        """(B, width_in, H, W) -> (B, width_out, H, W)."""
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

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """(batch*L, dim) -> (batch*L, dim); each image attends to its own L tokens."""
        # Written out, not F.scaled_dot_product_attention: engines fuse this form, and it traces to a
        # third of the nodes.
        q, k, v = (
            part.reshape(batch, -1, self.heads, self.head_dim).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1)
        y: Tensor = self.dropout(self.proj((weights @ v).transpose(1, 2).reshape(x.shape)))
        return y


class EncoderLayer(nn.Module):
    """Pre-norm transformer encoder layer: (batch*L, dim) -> (batch*L, dim)."""

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

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """Tokens of all images in one matrix: linear layers then trace to Gemm, the fastest in INT8."""
        x = x + self._drop(self.attn(self._norm(self.norm1, x, batch), batch), batch)
        return x + self._drop(self.mlp(self._norm(self.norm2, x, batch)), batch)

    @staticmethod
    def _norm(norm: nn.Module, x: Tensor, batch: int) -> Tensor:
        # The same numbers, but behind (B, L, dim) OpenVINO fuses the quantiser, which saves 9 % in INT8.
        y: Tensor = norm(x.reshape(batch, -1, x.shape[1]))
        return y.flatten(0, 1)

    def _drop(self, branch: Tensor, batch: int) -> Tensor:
        if isinstance(self.drop_path, nn.Identity):
            return branch
        # A path is dropped for a whole image, so the images must be the first dimension.
        kept: Tensor = self.drop_path(branch.reshape(batch, -1, branch.shape[-1]))
        return kept.flatten(0, 1)


def regular_grid(n: int, height: int, width: int) -> Tensor:
    """First locations, equation 3.2: (n*n, 2) as (y, x) in pixels of a (height, width) feature map."""
    steps = torch.arange(n, dtype=torch.float32) + 0.5
    return torch.cartesian_prod(steps * (height / n), steps * (width / n))


class _GridSample(torch.autograd.Function):
    """Bilinear sampling with zeros outside the map, with the gradient of the authors' kernel.

    It is written from their CUDA code, https://github.com/yuexy/PS-ViT, layers/cinclude, at e67e7f3. Between
    the first and the last pixel of each axis it is the derivative. On the ring of one pixel around these,
    where a neighbour is outside the map, it is another function:

    - Features learn with the weights of coordinates clamped to 0..H-1 and 0..W-1, so the pixel at the border
      learns as if the point lay on it.
    - A point with a coordinate of H-1 (W-1) or more gives its offset no gradient. The derivative would pull
      it by the whole value of the border's pixel.
    - A point with a coordinate below 0 gives its offset the slope between pixels 0 and 1, continued outwards.

    Points outside the ring give no gradient. The published weights were trained so. With the derivative
    instead, the gradients of the offset layers' weights differ by 27 to 38 % of their norm where 2.9 % of the
    points are on the ring, and by 5 to 13 % where 0.5 % are (PS-ViT-Ti, random offsets).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, location: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) features at (B, L, 2) pixels (y, x) -> (B, L, C)."""
        ctx.save_for_backward(features, location)
        height, width = features.shape[2:]
        scale = 2 / torch.tensor([height - 1, width - 1], dtype=location.dtype, device=location.device)
        grid = (location * scale - 1).flip(-1).unsqueeze(2)
        tokens = F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        return tokens.squeeze(3).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, L, C) gradient of the samples -> those of the features and of the locations."""
        features, location = ctx.saved_tensors
        batch, channels, height, width = features.shape
        rows = features.flatten(2).transpose(1, 2).reshape(-1, channels).to(grad.dtype)
        where = location.to(grad.dtype)
        last = torch.tensor([height - 1, width - 1], dtype=grad.dtype, device=grad.device)
        inside = ((where > -1) & (where < last + 1)).all(-1, keepdim=True)
        where = torch.where(inside, where, 0)
        grad = torch.where(inside, grad, 0)
        clamped = where.clamp(min=0).minimum(last)
        low = clamped.floor()
        high = (low + 1).minimum(last)
        (y0, x0), (y1, x1) = low.long().unbind(-1), high.long().unbind(-1)
        first_row = torch.arange(batch, device=grad.device).unsqueeze(1) * (height * width)
        index = torch.stack([first_row + y * width + x for y in (y0, y1) for x in (x0, x1)])

        ty, tx = (clamped - low).unbind(-1)
        weights = torch.stack([y * x for y in (1 - ty, ty) for x in (1 - tx, tx)])
        updates = weights.unsqueeze(-1) * grad
        learned = torch.zeros_like(rows).index_add_(0, index.flatten(), updates.flatten(0, 2))

        # (4, B, L): how the loss depends on the weight of each neighbour.
        v00, v01, v10, v11 = (rows[index] * grad).sum(-1)
        (after_y, after_x), (before_y, before_x) = (where - low).unbind(-1), (high - where).unbind(-1)
        along_y = before_x * (v10 - v00) + after_x * (v11 - v01)
        along_x = before_y * (v01 - v00) + after_y * (v11 - v10)
        moved = torch.stack([along_y, along_x], dim=-1)
        learned = learned.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return learned.to(features.dtype), moved.to(location.dtype)


class Sample(nn.Module):
    """Bilinear sampling, equation 3.3; pixels outside the map count as zeros, as in the authors' kernel.

    In training its gradient is that kernel's too, which at the border is not the derivative: `_GridSample`.
    """

    def forward(self, features: Tensor, grid: Tensor, shift: Tensor) -> Tensor:
        """(B, C, H, W) features at grid (L, 2) + shift (B, L, 2), both in pixels -> (B*L, C)."""
        if torch.compiler.is_exporting():
            return self._gather(features, grid, shift)
        tokens: Tensor = _GridSample.apply(features, grid + shift)  # type: ignore[no-untyped-call]
        return tokens.flatten(0, 1)

    @staticmethod
    def _gather(features: Tensor, grid: Tensor, shift: Tensor) -> Tensor:
        """The same function as engines get it: four row look-ups and a weighted sum.

        Engines run it 1.1 times faster than GridSample. Whole pixels and fractions never meet in one
        number: a coordinate such as 45.3 keeps two bits of fraction in bf16, a fraction keeps eight.
        """
        batch, channels, height, width = features.shape
        # Flattened first: OpenVINO moves a flat map from its own layout ten times faster.
        rows = features.flatten(2).transpose(1, 2).reshape(-1, channels)
        start = grid.floor()
        shift = shift + (grid - start)
        whole = shift.floor()
        fraction = (shift - whole).reshape(-1, 1, 2)
        corner = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        weight = (1 - corner) + (2 * corner - 1) * fraction
        pixel = (whole + start).reshape(-1, 1, 2) + corner
        inside = torch.minimum(pixel.clamp(min=0), torch.tensor([height - 1.0, width - 1.0]))
        weight = torch.where(inside == pixel, weight, 0.0)
        y, x = inside.to(torch.int64).unbind(-1)
        first_row = (torch.arange(batch) * (height * width)).reshape(-1, 1, 1)
        index = (y * width + x).reshape(batch, -1, 4) + first_row
        tokens = F.embedding(index.reshape(-1, 4), rows)
        return (tokens * weight.prod(-1).unsqueeze(-1)).sum(1)


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
        """(B, C, H, W) -> tokens (B*n*n, C) and the points of every iteration (B, T, n*n, 2)."""
        batch, _, height, width = features.shape
        size = torch.tensor([height, width], dtype=features.dtype, device=features.device)
        grid = regular_grid(self.n, height, width).to(features)
        shift = torch.zeros_like(grid).expand(batch, -1, -1)
        tokens = self._first_tokens(features, grid, shift) + self.pos_layer(grid / size).repeat(batch, 1)
        tokens = self.layers[0](tokens, batch)
        trace = [grid.expand(batch, -1, -1)]
        for t in range(1, self.iterations):
            offsets = self.offset_layers[t - 1](tokens).reshape(batch, -1, 2)
            sampled = self.sample(features, grid, shift + offsets)
            # As the authors' code: the stored location moves by the detached offset, so that each offset
            # learns only through the very next sampling.
            shift = shift + offsets.detach()
            points = grid + shift
            layer = self.layers[min(t, len(self.layers) - 1)]
            tokens = layer(sampled + self.pos_layer((points / size).reshape(-1, 2)) + tokens, batch)
            trace.append(points)
        return tokens, torch.stack(trace, dim=1)

    def _first_tokens(self, features: Tensor, grid: Tensor, shift: Tensor) -> Tensor:
        """Tokens of the regular grid; a strided slice where that falls on whole pixels."""
        height, width = features.shape[2:]
        step_y, step_x = height // self.n, width // self.n
        exact = (step_y * self.n, step_x * self.n) == (height, width)
        if exact and step_y % 2 == 0 and step_x % 2 == 0:
            tokens = features[:, :, step_y // 2 :: step_y, step_x // 2 :: step_x]
            return tokens.flatten(2).transpose(1, 2).flatten(0, 1)
        sampled: Tensor = self.sample(features, grid, shift)
        return sampled


class PSViT(Model):
    """PS-ViT (thesis figure 4): convolutional stem, progressive sampling, encoder, class-token head."""

    config: PSViTConfig
    # What stays float in every engine, as patterns over module paths: all that makes the coordinates at
    # which the next iteration samples. A rounding there reads the wrong pixels.
    float_modules: tuple[str, ...] = (
        "sampler",
        "sampler.offset_layers.*",
        "sampler.pos_layer",
        "sampler.sample",
    )
    output_names = ("logits", "points")

    def __init__(self, config: PSViTConfig) -> None:
        super().__init__()
        self.config = config
        if config.iterations == 1:
            # Nothing steers a single sampling, which is at fixed places.
            self.float_modules = ()
        depth = config.iterations + config.encoder_layers
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        kernel, step = (7, 2) if config.stride == 4 else (3, 1)
        pool = nn.Identity() if config.stride == 1 else nn.MaxPool2d(3, stride=2, padding=1)
        self.stem = nn.Sequential(
            nn.Conv2d(3, config.stem_width, kernel, stride=step, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(config.stem_width),
            nn.ReLU(),
            pool,
            Bottleneck(config.stem_width, config.stem_width, config.stem_mid),
            Bottleneck(config.stem_mid, config.stem_width, config.dim),
        )
        self.sampler = ProgressiveSampler(config, rates)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.encoder = nn.ModuleList(EncoderLayer(config, rate) for rate in rates[config.iterations :])
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
        for name, parameter in self.sampler.offset_layers.named_parameters():
            if name.endswith("weight"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) images -> logits (B, num_classes)."""
        return self.deploy(images)[0]

    def layers(self) -> dict[str, nn.Module]:
        """The parts that follow each other from input to output, by name."""
        return {
            "stem": self.stem,
            "sampler": self.sampler,
            **{f"encoder.{i}": layer for i, layer in enumerate(self.encoder)},
        }

    def decisions(self, images: Tensor) -> dict[str, Tensor]:
        """Nothing: the points, which decide in between, are an output."""
        return {}

    def deploy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What an engine returns: logits (B, classes), and points (B, T, n*n, 2) in image pixels."""
        features = self.stem(images)
        batch, dim = features.shape[:2]
        tokens, points = self.sampler(features)
        cls_token = self.cls_token.expand(batch, -1, -1)
        tokens = torch.cat([cls_token, tokens.reshape(batch, -1, dim)], dim=1).flatten(0, 1)
        for layer in self.encoder:
            tokens = layer(tokens, batch)
        logits = self.head(self.norm(tokens.reshape(batch, -1, dim)[:, 0]))
        # With symmetric padding, a feature-map pixel p is centred on image pixel stride * p.
        return logits, points * self.config.stride


def card_parts(config: PSViTConfig, labels: Labels) -> CardParts:
    """The PS-ViT part of a card: class logits, and the sampling points in image pixels."""
    outputs = (
        TensorSpec("logits", (None, config.num_classes), "float32"),
        TensorSpec("points", (None, config.iterations, config.n**2, 2), "float32"),
    )
    image = ImageSpec((config.image_size, config.image_size), layout="NCHW", dtype="float32")
    return CardParts(outputs, image, {"logits": "logits", "points": "points"})


def _place(config: PSViTConfig, key: str, shape: tuple[int, ...]) -> Place:
    theirs = re.sub(r"\.mlp\.([03])\.", lambda m: f".mlp.fc{1 if m[1] == '0' else 2}.", key)
    if match := re.fullmatch(r"sampler\.pos_layer\.(.+)", theirs):
        aliases = (f"ps_layers.{t}.position_layer.{match[1]}" for t in range(config.iterations))
        return Place((f"pos_layer.{match[1]}", *aliases), shape)
    if match := re.fullmatch(r"sampler\.layers\.(\d+)\.(.+)", theirs):
        iterations = range(config.iterations) if config.share else [int(match[1])]
        return Place(tuple(f"ps_layers.{t}.transformer_layer.{match[2]}" for t in iterations), shape)
    if match := re.fullmatch(r"sampler\.offset_layers\.(\d+)\.(.+)", theirs):
        return Place((f"ps_layers.{match[1]}.offset_layer.{match[2]}",), shape)
    return Place((re.sub(r"^encoder\.", "trans_layers.", theirs),), shape)


# The layout of the authors' code.
LAYOUT = Layout(_place, heads=r"head\..*", spare=lambda config: {"point_coord": (1, config.n**2, 2)})
