"""Optimiser and learning rate: AdamW and timm's schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from vitkit.torchvision_shim import timm
from vitkit.train.config import TrainConfig

# Kept at their size, beside biases and norms: tables of relative positions, tokens and cluster centres.
_UNDECAYED = ("_table", "centres", "cls_token")


def make_optimizer(model: nn.Module, config: TrainConfig, layers: Sequence[str] = ()) -> Optimizer:
    """AdamW over what is not frozen: rates by `lr_scale` and depth, decay for matrices and kernels alone.

    `layers` names the parts of the network from input to output; what is in none is nearest to the output.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = next((s for prefix, s in config.lr_scale.items() if name.startswith(prefix)), 1.0)
        above = next((len(layers) - i for i, part in enumerate(layers) if f".{part}." in f".{name}"), 0)
        # Biases and the scales of norms keep their size.
        kernel = parameter.ndim > 1 and not name.endswith(_UNDECAYED)
        key = (scale * config.layer_decay**above, config.weight_decay if kernel else 0.0)
        groups.setdefault(key, []).append(parameter)
    return AdamW(
        [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()],
        lr=config.lr,
        fused=True,
    )


def make_schedule(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> Any:
    """timm's scheduler for steps: `step_update(n)` sets the rates for step n (from 0) of the training.

    Warm-up is a line from `warmup_lr` to `lr`; the decay's clock runs from the very first step.
    """
    total = config.epochs * steps_per_epoch
    warmup: dict[str, Any] = {
        "warmup_t": round(config.warmup_epochs * steps_per_epoch),
        "warmup_lr_init": config.warmup_lr,
        "t_in_epochs": False,
    }
    schedulers = timm.scheduler
    if config.schedule == "cosine":
        return schedulers.CosineLRScheduler(optimizer, total, lr_min=config.min_lr, **warmup)
    if config.schedule == "poly":
        return schedulers.PolyLRScheduler(optimizer, total, power=0.9, lr_min=config.min_lr, **warmup)
    drops = [int(total * share) for share in config.drops]
    return schedulers.MultiStepLRScheduler(optimizer, drops, decay_rate=0.1, warmup_prefix=False, **warmup)
