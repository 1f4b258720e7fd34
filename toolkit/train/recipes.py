"""Recipes: named functions, each returning the `TrainConfig` of a whole training run."""

from __future__ import annotations

from collections.abc import Callable

from vitkit.train.config import TrainConfig


def ps_vit_nano_demo() -> TrainConfig:
    """PS-ViT nano on `vitkit.data.shapes`: a few minutes on two CPU cores."""
    return TrainConfig(
        model="ps_vit_nano",
        epochs=20,
        batch_size=64,
        lr=2e-3,
        crop_pct=1.0,
        rotate=0.0,
        jitter=0.2,
        lr_scale={"sampler.offset_layers": 0.3},
        label_smoothing=0.05,
        options={"dim": 64, "heads": 2},
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "ps_vit_nano_demo": ps_vit_nano_demo,
}
