"""`timm:NAME` and `timm:NAME=FILE`: a network of timm, its weights and its own data configuration."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.exporters.source import Source
from vitkit.runtimes.card import sha256
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.sources.card_values import CardValues
from vitkit.sources.network import wrap_network

if TYPE_CHECKING:
    from torch import Tensor

_FITS = {"center": "cover", "squash": "stretch"}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def load(word: str, values: CardValues, keep_float: Sequence[str] = (), *, untrained: bool = False) -> Source:
    """The network NAME with weights of timm's cache or hub, of FILE after `=`, or random ones (seed 0).

    Size, crop, interpolation, mean, standard deviation and ImageNet's labels come from timm's configuration
    where `values` lack them. Files are safetensors or what torch reads without running code; the number of
    classes is that of their classifier. Raises BadRequest and BadInput.
    """
    name, _, file = word.partition("=")
    if untrained and file:
        raise BadRequest(f"--untrained is for random weights, but timm:{word} names a file of weights")
    path = Path(file) if file else None
    if path is not None and not path.is_file():
        raise BadInput(f"the weights {path} do not exist or are not a file")
    network = _create(name, values.size, pretrained=path is None and not untrained)
    origin: dict[str, Any] = {"timm": name}
    if path is not None:
        _fill(network, path, name)
        origin |= {"weights": path.name, "sha256": sha256(path)}
    elif untrained:
        origin |= {"weights": "untrained, seed 0"}
    said = configured(network, values.task)
    return wrap_network(network.eval(), name, values.over(said), origin, keep_float)


def _create(name: str, size: tuple[int, int] | None, *, pretrained: bool) -> Any:
    import torch

    from vitkit.torchvision_shim import from_timm, timm

    base = name.partition(".")[0]
    if ":" not in name and not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), 3)
        raise BadRequest(
            f"timm {timm.__version__} has no model {base!r}; "
            + (f"like it are {', '.join(near)}" if near else "its models are in timm.list_models()")
        )
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    fixed = size is not None and config is not None and config.fixed_input_size
    remedy = f"For weights in a file: timm:{name}=FILE; for random ones: --untrained" if pretrained else ""
    with from_timm(f"timm cannot make {name}", remedy), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=pretrained, **({"img_size": size} if fixed else {}))


def _fill(network: Any, path: Path, name: str) -> None:
    """Load weights from a file, with as many classes as they have; raises BadInput if they do not fit."""
    from vitkit.models.state import read_tensors, summarise, weight_problem

    tensors = read_tensors(path, network.state_dict())
    classes = _classes(network, tensors)
    if classes not in (None, network.num_classes):
        network.reset_classifier(classes)
    own = network.state_dict()
    problems = [f"{key} is missing" for key in own if key not in tensors]
    for key, tensor in tensors.items():
        if key not in own:
            problems.append(f"{key} is extra")
        elif tensor.shape != own[key].shape:
            problems.append(f"{key} is {list(tensor.shape)}, not {list(own[key].shape)}")
        elif own[key].is_floating_point() and (reason := weight_problem(key, tensor)):
            problems.append(f"{key} {reason}")
    if problems:
        raise BadInput(f"{path} does not hold the weights of timm's {name}: {summarise(problems)}")
    network.load_state_dict(tensors)


def _classes(network: Any, tensors: dict[str, Tensor]) -> int | None:
    """How many classes a checkpoint's classifier has; None if it has none that timm knows."""
    names = network.pretrained_cfg.get("classifier")
    first = names[0] if isinstance(names, (tuple, list)) else names
    weight = tensors.get(f"{first}.weight")
    return None if weight is None or weight.ndim == 0 else len(weight)


def configured(network: Any, task: str | None) -> CardValues:
    """What timm's configuration of a network says of its card, with labels unless `task` has no classes.

    Raises BadRequest for a network that does not take three channels.
    """
    from vitkit.torchvision_shim import timm

    config = timm.data.resolve_model_data_config(network)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise BadRequest(f"the network takes {channels} channels; vitkit's images have 3, RGB")
    interpolation, fit = config["interpolation"], _FITS.get(config["crop_mode"])
    return CardValues(
        task="classification" if network.num_classes else "tensors",
        size=(height, width),
        mean=tuple(map(float, config["mean"])),  # type: ignore[arg-type]
        std=tuple(map(float, config["std"])),  # type: ignore[arg-type]
        colour="RGB",
        # Squashed before a crop has no form here: it is then assumed to keep its shape, which is recorded.
        fit=None if fit == "stretch" and config["crop_pct"] < 1 else fit,
        crop_pct=float(config["crop_pct"]),
        interpolation=interpolation if interpolation in _INTERPOLATIONS else None,
        # Names of classes need classes: other tasks have none.
        **(_labels(network) if task in (None, "classification") else {}),
    )


def _labels(network: Any) -> dict[str, tuple[str, ...]]:
    """The classes' names: those of the configuration, or of the ImageNet subset that has as many."""
    from vitkit.torchvision_shim import timm

    config, count = network.pretrained_cfg, network.num_classes
    if (names := config.get("label_names")) and len(names) == count:
        described = config.get("label_descriptions") or {}
        return {"labels": tuple(described.get(name, name) for name in names), "label_ids": tuple(names)}
    subset = timm.data.infer_imagenet_subset(network)
    if subset is None or not count:
        return {}
    info = timm.data.ImageNetInfo(subset)
    return {
        "labels": tuple(info.index_to_description(i) for i in range(count)),
        "label_ids": tuple(info.index_to_label_name(i) for i in range(count)),
    }
