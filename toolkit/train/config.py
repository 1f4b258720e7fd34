"""What a training run needs, as one dataclass, and changes to it given as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from vitkit.runtimes.errors import BadRequest


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, beside the data.

    `model` and `options` are what `vitkit.models.build` takes; the number of classes comes from the data.
    `lr` is reached after a linear warm-up over `warmup_epochs` and falls along a cosine to zero;
    `lr_scale` multiplies it for the parameters whose name begins with a key, the first that fits.
    `clip_norm` bounds the norm of all gradients together; `inf` does not. `flip` is the chance of
    mirroring an image; `jitter` the largest change of contrast and brightness per channel, in units of the
    normalised image.

    Classification alone: `crop_pct` goes into the run's card; 1 leaves images that already have the
    model's size as they are. `shift` (part of the side), `zoom` (part of the size) and `rotate` (degrees)
    are the largest change either way.

    Panoptic segmentation alone: an image is scaled to the model's size times a factor between `scale_min`
    and `scale_max`, and cropped; `copy_paste` is the chance that things of another image are pasted into
    it. `samples` pixels are drawn for the instance and semantic losses. `mask_id` and `remask_blocks`
    are options of the model.

    Raises BadRequest for a value out of range.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.05
    warmup_epochs: int = 2
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    crop_pct: float = 0.9
    flip: float = 0.5
    shift: float = 0.1
    zoom: float = 0.1
    rotate: float = 0.0
    jitter: float = 0.2
    scale_min: float = 0.8
    scale_max: float = 1.25
    copy_paste: float = 0.0
    samples: int = 1024
    seed: int = 0
    device: str = "cpu"

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
            "flip": (0, 1),
            "shift": (0, 1),
            "zoom": (0, 0.9),
            "rotate": (0, 180),
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


def override(config: TrainConfig, changes: Mapping[str, str]) -> TrainConfig:
    """A config with settings changed, given as text: `{"lr": "1e-3", "options.dim": "64"}`.

    Raises BadRequest for an unknown setting and for a value that it cannot take. Whether the model knows
    its `options.*` is seen when it is built.
    """
    kinds = get_type_hints(TrainConfig)
    known = [name for name, kind in kinds.items() if kind in (str, int, float)]
    values: dict[str, Any] = {}
    options = dict(config.options)
    for key, text in changes.items():
        if key.startswith("options."):
            options[key.removeprefix("options.")] = text
            continue
        if key not in known:
            raise BadRequest(f"there is no setting {key!r}; there are {', '.join(known)}, options.NAME")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise BadRequest(f"{key}={text!r} is not a {kinds[key].__name__}") from None
    return replace(config, options=options, **values)
