"""Backbones of ReMaX, from timm: four maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.models.layers import NORM_EPS, NORM_MOMENTUM
from vitkit.models.state import summarise, weight_problem
from vitkit.runtimes.errors import BadInput

BACKBONES = ("mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv3_small_050", "resnet50")


class MobileNetV3(nn.Module):
    """MobileNetV3 up to its last 1x1 convolution, with the expanded endpoints of deeplab2.

    The map of a stage is what its last inverted bottleneck computes before squeezing: the output of the
    depthwise convolution, after norm and activation, before squeeze-and-excitation and projection.
    """

    def __init__(self, name: str, se_gate: str) -> None:
        super().__init__()
        from vitkit.torchvision_shim import timm

        network = timm.create_model(name, num_classes=0)
        self.conv_stem, self.bn1, self.blocks = network.conv_stem, network.bn1, network.blocks
        bottlenecks = self.flat()[:-1]
        # The last block of each stride but the deepest, which ends in the 1x1 convolution.
        self.taps: dict[int, int] = {}
        stride = 2
        for i, block in enumerate(bottlenecks):
            stride *= block.conv_dw.stride[0]
            if stride in (4, 8, 16):
                self.taps[stride] = i
            if se_gate == "sigmoid" and hasattr(block.se, "gate"):
                block.se.gate = nn.Sigmoid()
        ends = [bottlenecks[i].conv_dw for i in self.taps.values()]
        self.widths = (*(conv.out_channels for conv in ends), self.flat()[-1].conv.out_channels)

    def flat(self) -> list[Any]:
        """The blocks of all stages: bottlenecks, then the 1x1 convolution."""
        return [block for stage in self.blocks for block in stage]

    def layers(self) -> dict[str, nn.Module]:
        """The parts that follow each other from input to output, by name."""
        blocks = {
            f"blocks.{i}.{name}": block
            for i, stage in enumerate(self.blocks)
            for name, block in stage.named_children()
        }
        return {"conv_stem": self.conv_stem, "bn1": self.bn1, **blocks}

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps at strides 4, 8, 16, 32."""
        x = self.bn1(self.conv_stem(images))
        ends = set(self.taps.values())
        maps = []
        for i, block in enumerate(self.flat()):
            if i in ends:
                expanded, x = _expanded(block, x)
                maps.append(expanded)
            else:
                x = block(x)
        return [*maps, x]


def _expanded(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A bottleneck's inner map, and its output. Only blocks that narrow at their end have a `conv_pwl`."""
    if hasattr(block, "conv_pwl"):
        expanded = block.bn2(block.conv_dw(block.bn1(block.conv_pw(x))))
        y = block.bn3(block.conv_pwl(block.se(expanded)))
    else:
        expanded = block.bn1(block.conv_dw(x))
        y = block.bn2(block.conv_pw(block.se(expanded)))
    return expanded, block.drop_path(y) + x if block.has_skip else y


class ResNet(nn.Module):
    """ResNet-50 without its classifier; the stride of a stage sits in its first 3x3 convolution."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from vitkit.torchvision_shim import timm

        network = timm.create_model(name, num_classes=0)
        self.conv1, self.bn1, self.maxpool = network.conv1, network.bn1, network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        self.widths = (256, 512, 1024, 2048)

    def layers(self) -> dict[str, nn.Module]:
        """The parts that follow each other from input to output, by name."""
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        blocks = {
            f"layer{i}.{name}": block
            for i, stage in enumerate(stages, 1)
            for name, block in stage.named_children()
        }
        return {"conv1": self.conv1, "bn1": self.bn1, **blocks}

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps at strides 4, 8, 16, 32."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


def build_backbone(name: str, se_gate: str) -> MobileNetV3 | ResNet:
    """A freshly initialised backbone with kMaX's batch norm constants; `name` is one of BACKBONES."""
    network = ResNet(name) if name.startswith("resnet") else MobileNetV3(name, se_gate)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = NORM_EPS, NORM_MOMENTUM
    return network


def load_backbone(network: MobileNetV3 | ResNet, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load ImageNet weights under timm's or torchvision's names; classifiers are left out.

    Raises BadInput naming what is missing, misshapen or no weight.
    """
    own = network.state_dict()
    # Of timm's names and torchvision's, those that the file has more of.
    names = max(library_names(network), key=lambda names: len(tensors.keys() & names.values()))
    problems = []
    for key, name in names.items():
        if name not in tensors:
            # The batch counter is no weight; some files leave it out.
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name} is missing")
        elif tensors[name].shape != own[key].shape:
            problems.append(f"{name} is {list(tensors[name].shape)}, not {list(own[key].shape)}")
        elif reason := weight_problem(name, tensors[name]):
            problems.append(f"{name} {reason}")
    if problems:
        raise BadInput(f"{where} does not hold this backbone's weights: {summarise(problems)}")
    network.load_state_dict({key: tensors.get(name, own[key]) for key, name in names.items()})


def library_names(network: MobileNetV3 | ResNet) -> list[dict[str, str]]:
    """Our tensor names -> timm's, and -> torchvision's if these differ; both have ImageNet weights."""
    ours = network.state_dict()
    names = [{key: key for key in ours}]
    # Both libraries name ResNet's tensors alike.
    return [*names, _torchvision_names(network, ours)] if isinstance(network, MobileNetV3) else names


def _torchvision_names(network: MobileNetV3, keys: Mapping[str, Any]) -> dict[str, str]:
    """Our tensor names -> torchvision's, which numbers the stem, the blocks and the layers in a block."""
    modules = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    paths = [f"blocks.{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))]
    for i, (path, block) in enumerate(zip(paths, network.flat(), strict=True), start=1):
        modules |= {f"{path}.{own}": f"features.{i}.{theirs}" for own, theirs in _torchvision_layers(block)}
    split = {key: key.rpartition(".") for key in keys}
    return {key: f"{modules[path]}.{leaf}" for key, (path, _, leaf) in split.items()}


def _torchvision_layers(block: nn.Module) -> list[tuple[str, str]]:
    if hasattr(block, "conv"):
        return [("conv", "0"), ("bn1", "1")]
    found: list[tuple[str, str]] = []
    place = -1
    for name, layer in block.named_children():
        if name.startswith("conv"):
            place += 1
            found.append((name, f"block.{place}.0"))
        elif name.startswith("bn"):
            found.append((name, f"block.{place}.1"))
        elif name == "se" and len(list(layer.parameters())):
            place += 1
            found += [("se.conv_reduce", f"block.{place}.fc1"), ("se.conv_expand", f"block.{place}.fc2")]
    return found
