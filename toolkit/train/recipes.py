"""Recipes: named functions, each returning the `TrainConfig` of a whole training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from vitkit.runtimes.errors import BadRequest
from vitkit.train.config import TrainConfig


def ps_vit_nano_demo() -> TrainConfig:
    """PS-ViT nano on `vitkit.data.shapes`: a few minutes on two CPU cores."""
    return TrainConfig(
        model="ps_vit_nano",
        epochs=18,
        batch_size=32,
        lr=1.5e-3,
        # Offsets are sums over all channels: at the full rate the points leave the image in the first epochs.
        lr_scale={"sampler.offset_layers": 0.1},
        warmup_epochs=1,
        label_smoothing=0.05,
        crop_pct=1.0,
        rotate=15.0,
    )


def remax_nano_demo() -> TrainConfig:
    """ReMaX nano on generated scenes: about five minutes on two CPU cores."""
    return TrainConfig(
        model="remax_nano",
        epochs=14,
        batch_size=8,
        # Twice the thesis' 6e-3: a few thousand steps are all there are.
        lr=1.2e-2,
        weight_decay=0.02,
        warmup_epochs=1,
        # The thesis trains without clipping.
        clip_norm=math.inf,
        jitter=0.2,
        samples=256,
    )


def kmax_nano_demo() -> TrainConfig:
    """The same for the twin without relaxations, to compare with."""
    return replace(remax_nano_demo(), model="kmax_nano")


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "ps_vit_nano_demo": ps_vit_nano_demo,
    "remax_nano_demo": remax_nano_demo,
    "kmax_nano_demo": kmax_nano_demo,
}


def recipe_named(name: str) -> TrainConfig:
    """The settings of a recipe; raises BadRequest for an unknown name."""
    if name not in RECIPES:
        raise BadRequest(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]()
