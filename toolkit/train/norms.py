"""Batch norms whose statistics are those of all processes' images together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from vitkit.torchvision_shim import timm


def synchronise(module: nn.Module, device: torch.device) -> None:
    """Make every batch norm of a module count all processes' images, in place.

    On a GPU these are torch's own; they know no CPU, for which there are the classes below.
    """
    if device.type == "cuda":
        timm.layers.convert_sync_batchnorm(module)
        return
    for part in module.modules():
        if type(part) in _SYNCED:
            part.__class__ = _SYNCED[type(part)]


class _Synced(nn.modules.batchnorm._BatchNorm):
    """A batch norm over equal parts of a batch, one in each process.

    The sums' gradients are added up over the processes as the sums are; averaging the parameters'
    gradients, as data-parallel training does, then gives those of the whole batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        over = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        parts = torch.distributed.get_world_size()
        count = parts * x.numel() // x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = all_reduce(wide.sum(over)) / count  # type: ignore[no-untyped-call]
        centred = wide - mean.reshape(shape)
        variance = all_reduce((centred * centred).sum(over)) / count  # type: ignore[no-untyped-call]
        self._remember(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        y: Tensor = (centred * scale.reshape(shape) + self.bias.reshape(shape)).to(x.dtype)
        return y

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1


class _Synced1d(_Synced, nn.BatchNorm1d):
    pass


class _Synced2d(_Synced, nn.BatchNorm2d):
    pass


class _SyncedAct2d(_Synced, timm.layers.BatchNormAct2d):  # type: ignore[misc]
    """timm's batch norm with an activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return timm.layers.BatchNormAct2d.forward(self, x)  # type: ignore[no-any-return]
        return self.act(self.drop(_Synced.forward(self, x)))  # type: ignore[no-any-return, operator]


_SYNCED: dict[type, Any] = {
    nn.BatchNorm1d: _Synced1d,
    nn.BatchNorm2d: _Synced2d,
    timm.layers.BatchNormAct2d: _SyncedAct2d,
}
