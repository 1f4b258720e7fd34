"""Backbones of ReMaX, from timm: four maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.models.layers import NORM_EPS, NORM_MOMENTUM
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
        # The last block of each stride but the deepest, which ends in the 1x1 convolution.
        strides = [4, 8, 16]
        self.taps: dict[int, int] = {}
        stride = 2
        for i, block in enumerate(block for stage in self.blocks for block in stage):
            depthwise = getattr(block, "conv_dw", None)
            stride *= depthwise.stride[0] if depthwise is not None else 1
            if stride in strides:
                self.taps[stride] = i
        flat = [block for stage in self.blocks for block in stage]
        self.widths = (*(flat[self.taps[s]].conv_dw.out_channels for s in strides), flat[-1].conv.out_channels)
        if se_gate == "sigmoid":
            for block in flat:
                if isinstance(getattr(block, "se", None), nn.Module) and hasattr(block.se, "gate"):
                    block.se.gate = nn.Sigmoid()

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps at strides 4, 8, 16, 32."""
        x = self.bn1(self.conv_stem(images))
        ends = set(self.taps.values())
        maps = []
        for i, block in enumerate(block for stage in self.blocks for block in stage):
            if i in ends:
                expanded, x = _expanded(block, x)
                maps.append(expanded)
            else:
                x = block(x)
        return [*maps, x]


def _expanded(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """An inverted bottleneck's inner map, and its output."""
    y = block.bn1(block.conv_pw(x)) if hasattr(block, "conv_pwl") else x
    expanded = (block.bn2 if hasattr(block, "conv_pwl") else block.bn1)(block.conv_dw(y))
    y = block.se(expanded)
    y = block.bn3(block.conv_pwl(y)) if hasattr(block, "conv_pwl") else block.bn2(block.conv_pw(y))
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

    Raises BadInput naming what is missing or misshapen.
    """
    wanted = network.state_dict()
    found = _torchvision_names(tensors, wanted) if "features.0.0.weight" in tensors else dict(tensors)
    problems = []
    for name, own in wanted.items():
        if name not in found:
            # The batch counter is no weight; some files leave it out.
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name} is missing")
        elif found[name].shape != own.shape:
            problems.append(f"{name} is {list(found[name].shape)}, not {list(own.shape)}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise BadInput(f"{where} does not hold this backbone's weights: {shown}")
    network.load_state_dict({name: found.get(name, own) for name, own in wanted.items()})


def _torchvision_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's MobileNetV3 lists the same tensors in the same order, under other names."""
    features = [tensor for name, tensor in tensors.items() if name.startswith("features.")]
    if len(features) != len(wanted):
        raise BadInput(f"the file holds {len(features)} tensors of features, the backbone has {len(wanted)}")
    return dict(zip(wanted, features, strict=True))
