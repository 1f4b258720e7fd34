"""Networks of timm, whole, by their names there."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch

from vitkit.runtimes.errors import BadRequest
from vitkit.torchvision_shim import from_timm, timm


def create_timm(
    name: str, size: tuple[int, int] | None = None, *, pretrained: bool, classes: int | None = None
) -> Any:
    """A network of timm in training mode, its random weights those of seed 0.

    `size` (height, width) is passed on to networks that are built for one size. `pretrained` takes weights of
    timm's cache or hub; `classes` is their number if it is not the name's own. Raises BadRequest, with names
    like it, for an unknown name, and for whatever timm raises.
    """
    base = name.partition(".")[0]
    if ":" not in name and not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), 3)
        raise BadRequest(
            f"timm {timm.__version__} has no model {base!r}; "
            + (f"like it are {', '.join(near)}" if near else "its models are in timm.list_models()")
        )
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    fixed = size is not None and config is not None and config.fixed_input_size
    options = {"img_size": size if fixed else None, "num_classes": classes}
    remedy = f"For weights in a file: timm:{name}=FILE; for random ones: --untrained" if pretrained else ""
    with from_timm(f"timm cannot make {name}", remedy), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=pretrained, **options)
