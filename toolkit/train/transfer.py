"""Starting from weights that were trained before: what fits is taken, parts may be frozen."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from vitkit.models import Model
from vitkit.models.backbones import library_names, load_backbone
from vitkit.models.remax import ReMaX
from vitkit.models.state import read_tensors, summarise
from vitkit.runs import load_run
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.torchvision_shim import from_timm, timm


def initialise(network: Model, source: Path) -> list[str]:
    """Fill a network with the weights of a run, or of a file of a run's weights, in place.

    Layers that give one value for each class are left as they are where the number of classes differs;
    their tensors' names are returned. Another input size or number of PS-ViT's points needs no change of
    weights. Raises BadInput where anything else differs, and what reading raises.
    """
    own = network.state_dict()
    tensors = load_run(source).model.state_dict() if source.is_dir() else read_tensors(source, own)
    fresh = [name for name, tensor in own.items() if name in tensors and _per_class(tensor, tensors[name])]
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and name not in fresh and tensors[name].shape != tensor.shape
    ]
    if problems or len({own[name].shape[0] - tensors[name].shape[0] for name in fresh}) > 1:
        raise BadInput(
            f"{source} does not fit the model: {summarise(problems or fresh)}. Weights of other projects "
            "become a run by: vitkit import"
        )
    network.load_state_dict({name: own[name] if name in fresh else tensors[name] for name in own})
    return fresh


def _per_class(own: Tensor, other: Tensor) -> bool:
    """Do the two differ in their number of outputs alone?"""
    return own.ndim > 0 and own.shape[1:] == other.shape[1:] and own.shape[:1] != other.shape[:1]


def freeze(network: nn.Module, names: str) -> list[nn.Module]:
    """Stop parts of a network from learning, given as `stem,encoder.0`; returns the modules.

    Their batch norms keep their statistics only if the modules are set to eval after every `train()`.
    Raises BadRequest for a part that there is not.
    """
    frozen: list[nn.Module] = []
    for name in filter(None, names.split(",")):
        parameters = [p for key, p in network.named_parameters() if key == name or key.startswith(f"{name}.")]
        if not parameters:
            known = ", ".join(part for part, _ in network.named_children())
            raise BadRequest(f"freeze: the model has no part {name!r}; it has {known}")
        for parameter in parameters:
            parameter.requires_grad = False
        frozen += [module for key, module in network.named_modules() if key == name]
    return frozen


def fill_backbone(network: Model, source: str) -> None:
    """Fill a panoptic model's backbone, in place, from a file or, where `source` is `timm`, from its hub.

    Raises BadRequest where the hub does not have the weights, and what reading a file raises.
    """
    assert isinstance(network, ReMaX)
    if source == "timm":
        name = network.config.backbone
        with from_timm(f"the weights of {name} cannot be downloaded", "Name a file: --backbone-weights FILE"):
            tensors = dict(timm.create_model(name, pretrained=True).state_dict())
    else:
        known = {name for names in library_names(network.backbone) for name in names.values()}
        tensors = read_tensors(Path(source), known)
    load_backbone(network.backbone, tensors, source)
