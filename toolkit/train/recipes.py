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
        crop_min=0.8,
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


_PS_VIT_CODE = "the authors' code"
_PS_VIT_SOURCES = {
    "model": "thesis 3, table 8",
    "epochs": "thesis 3, table 4; the code adds 10 at the lowest rate, left out",
    "batch_size": "thesis 3, table 4",
    "warmup_lr": _PS_VIT_CODE,
    "min_lr": _PS_VIT_CODE,
    "label_smoothing": "thesis 3, table 4",
    "clip_norm": "none, as the code",
    "mixup": "thesis 3, table 4",
    "cutmix": "thesis 3, table 4",
    "switch_prob": _PS_VIT_CODE,
    "randaugment": "thesis 3, table 4; the code's policy of that strength",
    "interpolation": _PS_VIT_CODE,
    "ema": _PS_VIT_CODE,
    "crop_pct": "thesis 3, section 4.1: 256 to 224; the code's default is 0.9",
    "crop_min": "timm's default, which the code leaves",
}


def psvit_ti_share_imagenet() -> TrainConfig:
    """PS-ViT-Ti/14 with shared weights on ImageNet (thesis chapter 3); the rates are the code's for Ti."""
    rates = "the authors' code for Ti; thesis table 4, of B, has "
    return TrainConfig(
        model="ps_vit_ti_14_share",
        options={"drop_path": 0.1},
        epochs=300,
        batch_size=512,
        lr=1e-3,
        weight_decay=0.03,
        warmup_epochs=5,
        warmup_lr=1e-6,
        min_lr=1e-5,
        clip_norm=math.inf,
        crop_pct=0.875,
        mixup=0.8,
        cutmix=1.0,
        randaugment="rand-m9-mstd0.5-inc1",
        erase=0.25,
        ema=0.99996,
        workers=8,
        sources={
            **_PS_VIT_SOURCES,
            "lr": rates + "5e-4",
            "weight_decay": rates + "0.05",
            "warmup_epochs": "thesis 3, table 4",
            "erase": "the authors' code for Ti",
            "options": "drop_path: the authors' code; dropout 0: the code for Ti, thesis table 4 has 0.1",
        },
    )


def psvit_b_share_imagenet() -> TrainConfig:
    """PS-ViT-B/14 with shared weights on ImageNet, by thesis chapter 3, table 4."""
    thesis = "thesis 3, table 4"
    return replace(
        psvit_ti_share_imagenet(),
        model="ps_vit_b_14_share",
        options={"drop_path": 0.1, "dropout": 0.1},
        lr=5e-4,
        weight_decay=0.05,
        erase=0.0,
        sources={
            **_PS_VIT_SOURCES,
            "lr": thesis,
            "weight_decay": thesis,
            "warmup_epochs": thesis + "; the code has 3",
            "mixup": thesis + "; the code has 0.2",
            "erase": _PS_VIT_CODE,
            "options": "dropout: " + thesis + "; drop_path: the authors' code",
        },
    )


# 118,287 images in batches of 64.
_COCO_STEPS = 1849
_REMAX_SOURCES = {
    "epochs": "thesis 6, section 4.2: 27 epochs, 50,000 steps",
    "batch_size": "thesis 6, section 4.2",
    "lr": "thesis 6, section 4.2",
    "lr_scale": "thesis 6, section 4.2",
    "weight_decay": "thesis 6, section 4.2, short schedule",
    "warmup_epochs": "kMaX-DeepLab's code: 5,000 steps",
    "warmup_lr": "kMaX-DeepLab's code",
    "schedule": "thesis 6, section 4.2: a tenth at 85 and 95 % of the steps",
    "drops": "thesis 6, section 4.2",
    "clip_norm": "none: thesis 6, table 2",
    "scale_min": "thesis 6, section 4.2",
    "scale_max": "thesis 6, section 4.2",
    "copy_paste": "kMaX-DeepLab's code",
    "samples": "kMaX-DeepLab's code",
    "jitter": "ours: the published colour policy is a search result of its own",
    "options": "image_size: thesis 6, section 4.2, trains at 1281; mask_id: thesis 6, table 2",
}


def remax_t_coco() -> TrainConfig:
    """ReMaX-T on COCO panoptic, the thesis' short schedule (chapter 6, section 4.2)."""
    return TrainConfig(
        model="remax_t",
        options={"image_size": 1281, "mask_id": "sigmoid"},
        epochs=27,
        batch_size=64,
        lr=6e-3,
        lr_scale={"model.backbone": 0.1},
        weight_decay=0.005,
        warmup_epochs=5000 / _COCO_STEPS,
        warmup_lr=0.0,
        schedule="steps",
        clip_norm=math.inf,
        scale_min=0.3,
        scale_max=1.7,
        copy_paste=0.5,
        samples=4096,
        workers=8,
        sources=_REMAX_SOURCES,
    )


def remax_s_coco() -> TrainConfig:
    """ReMaX-S on COCO panoptic, as ReMaX-T."""
    return replace(remax_t_coco(), model="remax_s")


def remax_t_cityscapes() -> TrainConfig:
    """ReMaX-T on Cityscapes (thesis chapter 6, section 4.3), on square crops."""
    # 2,975 images in batches of 32.
    return replace(
        remax_t_coco(),
        options={"image_size": 1025, "mask_id": "sigmoid", "queries": 256},
        epochs=645,
        batch_size=32,
        lr=3e-3,
        warmup_epochs=5000 / 93,
        scale_min=0.5,
        scale_max=2.0,
        sources={
            **_REMAX_SOURCES,
            "epochs": "thesis 6, section 4.3: 60,000 steps",
            "batch_size": "thesis 6, section 4.3",
            "lr": "thesis 6, section 4.3",
            "warmup_epochs": "thesis 6, section 4.3: 5,000 steps",
            "scale_min": "kMaX-DeepLab's code",
            "scale_max": "kMaX-DeepLab's code",
            "options": "queries: thesis 6, section 4.3; image_size: ours, for 1025x2049 and stride 2",
        },
    )


def remax_t_ade20k() -> TrainConfig:
    """ReMaX-T on ADE20K, 100,000 steps of kMaX-DeepLab's recipe with ReMaX' rates."""
    # 20,210 images in batches of 64.
    return replace(
        remax_t_coco(),
        options={"image_size": 641, "mask_id": "sigmoid"},
        epochs=316,
        warmup_epochs=5000 / 316,
        scale_min=0.5,
        scale_max=2.0,
        sources={
            **_REMAX_SOURCES,
            "epochs": "kMaX-DeepLab's code: 100,000 steps",
            "scale_min": "kMaX-DeepLab's code",
            "scale_max": "kMaX-DeepLab's code",
            "lr": "thesis 6, section 4.2 (of COCO)",
            "batch_size": "ours, as COCO",
            "options": "image_size: kMaX-DeepLab's code",
        },
    )


def psvit_ti_share_cifar10() -> TrainConfig:
    """PS-ViT-Ti with shared weights on CIFAR-10, from scratch: half an hour on a large GPU."""
    return TrainConfig(
        model="ps_vit_ti_14_share",
        # Every pixel of 32x32 is a feature-map pixel: the published stem would leave 8x8 of them.
        options={"image_size": 32, "stride": 1, "n": 8, "drop_path": 0.1},
        epochs=100,
        batch_size=256,
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=5,
        crop_pct=1.0,
        crop_min=0.4,
        mixup=0.8,
        cutmix=1.0,
        switch_prob=0.8,
        transmix=True,
        randaugment="rand-m7-mstd0.5-inc1",
        precision="bf16",
        ema=0.9995,
        workers=8,
        sources={
            "model": "thesis 3, table 8; the stem, the number of points and what is not named here are ours",
            "options": "drop_path: the authors' code of PS-ViT",
            "mixup": "TransMix' code",
            "cutmix": "TransMix' code",
            "switch_prob": "TransMix' code",
            "transmix": "thesis 4, whose future work PS-ViT is",
        },
    )


def psvit_nano_cifar10() -> TrainConfig:
    """PS-ViT nano on CIFAR-10: twenty minutes on a CPU core, far from what longer training reaches."""
    return TrainConfig(
        model="ps_vit_nano",
        options={"image_size": 32, "stride": 2, "n": 8},
        epochs=8,
        batch_size=64,
        lr=2e-3,
        lr_scale={"sampler.offset_layers": 0.1},
        warmup_epochs=0.5,
        crop_pct=1.0,
        crop_min=0.6,
        # Few epochs: half of the batches stay as they are.
        mix_prob=0.5,
        cutmix=1.0,
        transmix=True,
        ema=0.998,
    )


def psvit_ti_share_finetune() -> TrainConfig:
    """PS-ViT-Ti/14 with shared weights on one's own classes, from `--init`; the values are ours."""
    return TrainConfig(
        model="ps_vit_ti_14_share",
        epochs=30,
        batch_size=128,
        lr=1e-4,
        weight_decay=0.03,
        warmup_epochs=2,
        crop_pct=0.875,
        crop_min=0.3,
        randaugment="rand-m7-mstd0.5-inc1",
        ema=0.999,
        workers=8,
    )


def remax_t_finetune() -> TrainConfig:
    """ReMaX-T on one's own panoptic data, from `--init`; the values are ours."""
    return TrainConfig(
        model="remax_t",
        epochs=50,
        batch_size=16,
        lr=1e-3,
        lr_scale={"model.backbone": 0.1},
        weight_decay=0.005,
        warmup_epochs=2,
        clip_norm=math.inf,
        scale_min=0.5,
        scale_max=1.5,
        copy_paste=0.5,
        samples=4096,
        ema=0.999,
        workers=8,
    )


_ALL = (
    psvit_ti_share_imagenet,
    psvit_b_share_imagenet,
    remax_t_coco,
    remax_s_coco,
    remax_t_cityscapes,
    remax_t_ade20k,
    psvit_ti_share_cifar10,
    psvit_nano_cifar10,
    psvit_ti_share_finetune,
    remax_t_finetune,
    ps_vit_nano_demo,
    remax_nano_demo,
    kmax_nano_demo,
)
RECIPES: dict[str, Callable[[], TrainConfig]] = {recipe.__name__: recipe for recipe in _ALL}


def recipe_named(name: str) -> TrainConfig:
    """The settings of a recipe; raises BadRequest for an unknown name."""
    if name not in RECIPES:
        raise BadRequest(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]()
