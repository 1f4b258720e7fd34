"""`timm:NAME` and `timm:NAME=FILE`: a network of timm, its weights and its own data configuration."""

from __future__ import annotations

from collections.abc import Sequence
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
    # Late, because it imports torch.
    from vitkit.models.timm_network import create_timm

    network = create_timm(name, values.size, pretrained=path is None and not untrained)
    origin: dict[str, Any] = {"timm": name}
    if path is not None:
        _fill(network, path, name)
        origin |= {"weights": path.name, "sha256": sha256(path)}
    elif untrained:
        origin |= {"weights": "untrained, seed 0"}
    # With the name, all that a run of it needs to be built again.
    origin["classes"] = network.num_classes
    said = configured(network, values.task)
    return wrap_network(network.eval(), name, values.over(said), origin, keep_float)


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
    # Names of classes need classes: other tasks have none.
    labels, label_ids = _labels(network) if task in (None, "classification") else (None, None)
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
        labels=labels,
        label_ids=label_ids,
    )


def _labels(network: Any) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Labels and their ids, of the configuration or of the ImageNet subset that has as many classes."""
    from vitkit.torchvision_shim import timm

    config, count = network.pretrained_cfg, network.num_classes
    if (names := config.get("label_names")) and len(names) == count:
        described = config.get("label_descriptions") or {}
        return tuple(described.get(name, name) for name in names), tuple(names)
    subset = timm.data.infer_imagenet_subset(network)
    if subset is None or not count:
        return None, None
    info = timm.data.ImageNetInfo(subset)
    return (
        tuple(info.index_to_description(i) for i in range(count)),
        tuple(info.index_to_label_name(i) for i in range(count)),
    )
