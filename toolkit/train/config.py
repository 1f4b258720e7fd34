"""What a training run needs, as one dataclass, and changes to it given as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from vitkit.runtimes.errors import BadRequest

CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "distill": ("soft", "hard"),
    "schedule": ("cosine", "poly", "steps"),
    "interpolation": ("random", "bilinear", "bicubic"),
    "device": ("auto", "cpu", "cuda"),
    "track": ("auto", "tensorboard", "wandb", "none"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, beside the data.

    `model` and `options` are what `vitkit.models.build` takes; the number of classes comes from the data.
    `lr` is reached after a linear warm-up from `warmup_lr` over `warmup_epochs` and falls to `min_lr` by
    the `schedule`: along a cosine, as (1 - t) ** 0.9 (`poly`), or to a tenth after each share of the
    training in `drops` (`steps`). `lr_scale` multiplies it for the parameters whose name begins with a key,
    the first that fits, and `layer_decay` once for each layer between them and the output; `freeze` names
    parts that do not learn, such as `stem,sampler`. A step of the optimiser takes `batch_size` images, of
    all processes together, in `accumulate` passes. `ema` is the decay of a moving average of the weights,
    which the run then keeps; 0 keeps none. `precision` is fp32, bf16 or fp16 (automatic mixed precision),
    `device` auto, cpu or cuda. `recompute` computes each layer's activations again in the backward pass
    rather than keep them; `compile` names a backend of `torch.compile`, such as inductor. `workers`
    processes decode images; those that fit into `cache_mb` are decoded once, and of shards from a URL the
    newest `shard_cache_gb` are kept. A checkpoint is written after each epoch, and within an epoch every
    `save_minutes`. `track` says who draws curves while it runs: tensorboard, wandb (Weights & Biases),
    none, or auto, which is TensorBoard where it is installed. `clip_norm` bounds the norm of all gradients
    together; `inf` does not. `flip` is the chance of mirroring an image; `jitter` the largest change of
    contrast and brightness per channel, in units of the normalised image.

    Classification alone: `crop_pct` goes into the run's card; 1 leaves images that already have the
    model's size as they are. Training images are crops of at least `crop_min` of the area, resized by an
    `interpolation`, changed by timm's `randaugment` policy (such as rand-m9-mstd0.5-inc1; it replaces
    `jitter`), and with the chance `erase` a part is overwritten. `mix_prob` of the batches are mixed:
    `patch_mix` of them by Patch Mixing (random patches of a `patch_grid`, of which `patch_min` to
    `patch_max` are pasted), of the rest `switch_prob` by CutMix and the others by Mixup; `mixup` and
    `cutmix` are the alphas of their distributions, 0 for never. `transmix` weighs CutMix' labels by the
    class token's attention.

    A `teacher`, which is a run's folder or timm:NAME (pretrained; timm:NAME=FILE with weights of one's own),
    has `distill_weight` of the loss: `soft` takes its probabilities at a `temperature`, `hard` its best
    class.

    Panoptic segmentation alone: an image is scaled to the model's size times a factor between `scale_min`
    and `scale_max`, and cropped; `copy_paste` is the chance that things of another image are pasted into
    it. `samples` pixels are drawn for the instance and semantic losses. `mask_id` and `remask_blocks`
    are options of the model.

    `sources` say of settings where their values come from.

    Raises BadRequest for a value out of range.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    freeze: str = ""
    weight_decay: float = 0.05
    warmup_epochs: float = 2
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    crop_pct: float = 0.9
    mix_prob: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    transmix: bool = False
    patch_mix: float = 0.0
    patch_grid: int = 14
    patch_min: float = 0.1
    patch_max: float = 0.5
    teacher: str = ""
    distill: str = "soft"
    distill_weight: float = 0.5
    temperature: float = 1.0
    flip: float = 0.5
    crop_min: float = 0.08
    randaugment: str = ""
    erase: float = 0.0
    interpolation: str = "random"
    jitter: float = 0.2
    scale_min: float = 0.8
    scale_max: float = 1.25
    copy_paste: float = 0.0
    samples: int = 1024
    accumulate: int = 1
    precision: str = "fp32"
    recompute: bool = False
    compile: str = ""
    ema: float = 0.0
    schedule: str = "cosine"
    drops: tuple[float, ...] = (0.85, 0.95)
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    workers: int = 0
    cache_mb: int = 1024
    shard_cache_gb: float = 50.0
    save_minutes: float = 10.0
    seed: int = 0
    device: str = "auto"
    track: str = "auto"
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = {
            "epochs": (1, math.inf),
            "batch_size": (1, math.inf),
            "lr": (0, 100),
            "weight_decay": (0, 100),
            "warmup_epochs": (0, math.inf),
            "label_smoothing": (0, 0.99),
            "clip_norm": (1e-6, math.inf),
            "crop_pct": (0.01, 1),
            "mix_prob": (0, 1),
            "mixup": (0, 100),
            "cutmix": (0, 100),
            "switch_prob": (0, 1),
            "patch_mix": (0, 1),
            "layer_decay": (0.01, 1),
            "distill_weight": (0, 1),
            "temperature": (0.01, 100),
            "patch_grid": (1, 1000),
            "patch_min": (0, 1),
            "patch_max": (self.patch_min, 1),
            "flip": (0, 1),
            "crop_min": (0.01, 1),
            "erase": (0, 1),
            "accumulate": (1, 10_000),
            "ema": (0, 0.999999),
            "warmup_lr": (0, 100),
            "min_lr": (0, 100),
            "workers": (0, 1000),
            "cache_mb": (0, math.inf),
            "shard_cache_gb": (0, math.inf),
            "save_minutes": (0, math.inf),
            "jitter": (0, 10),
            "scale_min": (0.05, 20),
            "scale_max": (self.scale_min, 20),
            "copy_paste": (0, 1),
            "samples": (1, math.inf),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise BadRequest(f"{name} is {value}; it must lie between {low} and {high}")
        for name, choice in CHOICES.items():
            if getattr(self, name) not in choice:
                raise BadRequest(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(choice)}")


def override(config: TrainConfig, changes: Mapping[str, str]) -> TrainConfig:
    """A config with settings changed, given as text: `{"lr": "1e-3", "options.dim": "64"}`.

    Raises BadRequest for an unknown setting and for a value that it cannot take. Whether the model knows
    its `options.*` is seen when it is built.
    """
    kinds = get_type_hints(TrainConfig)
    known = [name for name, kind in kinds.items() if kind in (str, int, float, bool)]
    values: dict[str, Any] = {}
    options = dict(config.options)
    for key, text in changes.items():
        if key.startswith("options."):
            options[key.removeprefix("options.")] = text
            continue
        if key not in known:
            raise BadRequest(f"there is no setting {key!r}; there are {', '.join(known)}, options.NAME")
        try:
            values[key] = _truth(text) if kinds[key] is bool else kinds[key](text)
        except ValueError:
            raise BadRequest(f"{key}={text!r} is not a {kinds[key].__name__}") from None
    return replace(config, options=options, **values)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def training_provenance(config: TrainConfig) -> dict[str, object]:
    """The entries of a card's provenance about how its weights were trained."""
    return {"weights": "trained", "epochs": config.epochs, "seed": config.seed}
