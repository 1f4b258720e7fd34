"""Layers that kMaX's decoders and heads are made of: products without bias, batch norms, exact GELU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of every batch norm of the network, backbone included (deeplab2's 0.99 is 0.01 in torch's reading).
NORM_EPS = 1e-3
NORM_MOMENTUM = 0.01


def init_normal(tensor: Tensor, std: float) -> None:
    """Fill a weight from a normal distribution cut off at two standard deviations."""
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def batch_norm_2d(channels: int, gamma: float = 1.0) -> nn.BatchNorm2d:
    """A batch norm over (B, channels, H, W) with kMaX's constants, its scale set to `gamma`."""
    norm = nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)
    nn.init.constant_(norm.weight, gamma)
    return norm


def batch_norm_1d(channels: int, gamma: float = 1.0) -> nn.BatchNorm1d:
    """A batch norm over (L, channels) or (B, channels, L) with kMaX's constants."""
    norm = nn.BatchNorm1d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)
    nn.init.constant_(norm.weight, gamma)
    return norm


class ConvNorm(nn.Module):
    """Convolution and batch norm, with an exact GELU behind them where `act`.

    `gamma` 0 makes a residual branch start as nothing.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: int = 1,
        *,
        act: bool = False,
        gamma: float = 1.0,
        bias: bool = False,
        groups: int = 1,
        dilation: int = 1,
        std: float | None = None,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(
            width_in, width_out, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias
        )
        self.norm = batch_norm_2d(width_out, gamma)
        self.act = act
        if groups == 1:
            init_normal(self.conv.weight, (2 / width_in) ** 0.5 if std is None else std)
        else:
            nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H, W)."""
        y: Tensor = self.norm(self.conv(x))
        return F.gelu(y) if self.act else y


class LinearNorm(nn.Module):
    """Linear layer without bias and batch norm, with an exact GELU behind them where `act`."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        act: bool = False,
        gamma: float = 1.0,
        std: float | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out, bias=False)
        self.norm = batch_norm_1d(width_out, gamma)
        self.act = act
        init_normal(self.linear.weight, (2 / width_in) ** 0.5 if std is None else std)

    def forward(self, x: Tensor) -> Tensor:
        """(L, width_in) -> (L, width_out), rows of all images in one matrix."""
        if self.training:
            y: Tensor = self.norm(self.linear(x))
        else:
            scale, shift = scale_and_shift(self.norm)
            # Folded here, because engines fold a batch norm only into convolutions.
            y = F.linear(x, self.linear.weight * scale.unsqueeze(1), shift)
        return F.gelu(y) if self.act else y


def scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm does outside training, as y = scale * x + shift; (channels,) each."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        # Flattened first: OpenVINO moves a flat map from its own layout ten times faster.
        y = super().forward(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners on corners: what fits maps of 32k+1 pixels and their strides."""
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class DropPath(nn.Module):
    """Drops a residual branch for whole images while training (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """(batch * L, C) rows, image after image -> the same."""
        if not self.training or not self.rate:
            return x
        kept = torch.empty(batch, 1, device=x.device).bernoulli_(1 - self.rate) / (1 - self.rate)
        return x * kept.repeat_interleave(x.shape[0] // batch, dim=0).to(x.dtype)
