"""torch -> an ONNX graph that takes camera images, its nodes named by module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitkit.exporters.simplify import forget_the_maker, name_by_module, quiet, simplify
from vitkit.exporters.targets import OPSET
from vitkit.runtimes.card import ImageSpec
from vitkit.runtimes.errors import ExportFailed

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

    from vitkit.exporters.source import Deployable


def trace(module: Deployable, name: str, image: ImageSpec, batch: int | None, opset: int) -> ModelProto:
    """A module as a float32 ONNX graph called `name` that takes `image`-shaped inputs.

    BatchNorms are folded into their convolutions and all constants folded. Every node is named
    `<module path>/<operator>`, which is what float policies match. Raises ExportFailed if torch's exporter
    did not write what it was asked for.
    """
    import onnx_ir

    model = simplify(_capture(module, image, batch, opset))
    name_by_module(model)
    forget_the_maker(model)
    if model.opset_imports.get("") != opset:
        raise ExportFailed(
            f"asked for opset {opset}, the exporter wrote {model.opset_imports.get('')}; "
            f"use --opset {OPSET.default}"
        )
    if isinstance(model.graph.inputs[0].shape[0], int) != (batch is not None):
        raise ExportFailed(f"{name} fixes its batch size in its code; export without --dynamic-batch")
    model.graph.name = name
    proto: ModelProto = onnx_ir.to_proto(model)
    return proto


def _capture(module: Deployable, image: ImageSpec, batch: int | None, opset: int) -> Any:
    """The module as torch's exporter writes it, its own optimiser off."""
    import torch

    example, dynamic = _example(image, batch)
    with quiet():
        program = torch.onnx.export(
            camera_module(module, image),
            (example,),
            dynamo=True,
            # The exporter's own optimiser miscompiles Reshape-MatMul-Reshape with equal leading sizes.
            optimize=False,
            opset_version=opset,
            input_names=["image"],
            output_names=list(module.output_names),
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    return program.model


def _example(image: ImageSpec, batch: int | None) -> tuple[Tensor, Any]:
    import torch

    height, width = image.size
    shape = (height, width, 3) if image.layout == "NHWC" else (3, height, width)
    # A free batch is traced at 2: torch takes a dimension of 1 for a constant.
    example = torch.zeros((batch or 2, *shape), dtype=getattr(torch, image.dtype))
    return example, None if batch else ({0: torch.export.Dim("batch")},)


def camera_module(module: Deployable, image: ImageSpec) -> nn.Module:
    """A module that takes camera pixels, or normalised NCHW, and returns the outputs of `module`."""
    import torch

    class Camera(torch.nn.Module):
        mean: Tensor
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            # Of a foreign network its own paths name the nodes, without the wrapper's.
            self.model: Any = getattr(module, "network", module)
            # One value per pixel and channel of a row: engines vectorise that, but not a period of 3.
            self.register_buffer("mean", 255 * torch.tensor(image.mean).repeat(image.size[1]))
            self.register_buffer("scale", 1 / (255 * torch.tensor(image.std)).repeat(image.size[1]))

        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            if image.dtype == "uint8":
                rows = pixels.reshape(-1, image.size[0], image.size[1] * 3).float()
                pixels = ((rows - self.mean) * self.scale).reshape(pixels.shape).permute(0, 3, 1, 2)
            return module.deploy(pixels)

    return Camera().eval()
