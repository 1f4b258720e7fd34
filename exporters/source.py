"""What an exporter starts from: a float model and its card."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vitkit.calibration.policy import check_float_modules
from vitkit.runtimes.card import ImageSpec, ModelCard

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn


class Deployable(Protocol):
    """A torch module that says what its engine returns and what of it must stay float.

    In `float_modules`, `a.b` is the code of module a.b itself, `a.b.*` that of the modules below it.
    """

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what `deploy` returns, in order."""
        ...

    @property
    def float_modules(self) -> tuple[str, ...]:
        """What stays float, as glob patterns over module paths."""
        ...

    def parameters(self) -> Iterator[Any]:
        """The weights, at least one."""
        ...

    def deploy(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised (B, 3, H, W) images -> the tensors that the engine returns."""
        ...

    def decisions(self, images: Tensor) -> dict[str, Tensor]:
        """Decisions inside the network on which all that follows hangs, by the name of their node."""
        ...


class Reference(Protocol):
    """A float network that engines are compared with: a `Source`, or a float engine."""

    @property
    def card(self) -> ModelCard:
        """The card of its run or artifact."""
        ...

    @property
    def predict(self) -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
        """Inputs (N, ...) as its card prepares them -> outputs by name."""
        ...

    @property
    def decisions(self) -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
        """The same inputs -> its decisions by node name, as `Deployable.decisions`; empty if unknown."""
        ...


class Exportable(Reference, Protocol):
    """A float network that exporters can turn into engines: a `Source` of torch, or one of an ONNX file."""

    @property
    def float_modules(self) -> tuple[str, ...]:
        """What stays float, as glob patterns over module paths."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        ...

    def graph(self, image: ImageSpec, batch: int | None, opset: int) -> ModelProto:
        """The network as a float32 ONNX graph that takes `image`-shaped inputs, `batch` None for any number.

        BatchNorms are folded into their convolutions and all constants folded. Every node is named
        `<module path>/<operator>`, which is what float policies match. Raises ExportFailed if there is no
        such graph, or if a pattern of `float_modules` matches no node.
        """
        ...


@dataclass(frozen=True)
class Source:
    """A float torch model in eval mode, and the card of its run (normalised NCHW float32 input).

    `traces` are the graphs that `graph` has made of it, by request and weights.
    """

    module: Deployable
    card: ModelCard
    traces: dict[Hashable, ModelProto] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def float_modules(self) -> tuple[str, ...]:
        """What stays float, as glob patterns over module paths."""
        return tuple(self.module.float_modules)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(self.module.output_names)

    def graph(self, image: ImageSpec, batch: int | None, opset: int) -> ModelProto:
        """The network as a float32 ONNX graph; see `Exportable.graph`."""
        from vitkit.exporters.trace import trace

        # Several engines of one source share the trace, which takes most of the time of an export.
        key = (image, batch, opset, _weights_hash(self.module))
        if key not in self.traces:
            self.traces[key] = trace(self.module, self.card.name, image, batch, opset)
        model = deepcopy(self.traces[key])
        check_float_modules([node.name for node in model.graph.node], self.float_modules)
        return model

    def predict(self, inputs: NDArray[np.float32], batch: int = 16) -> dict[str, NDArray[Any]]:
        """The float reference: normalised (N, 3, H, W) -> outputs by name, in torch float32."""
        import torch

        parts, device = [], next(self.module.parameters()).device
        with torch.inference_mode():
            for start in range(0, len(inputs), batch):
                images = torch.from_numpy(np.ascontiguousarray(inputs[start : start + batch])).to(device)
                parts.append([tensor.cpu().numpy() for tensor in self.module.deploy(images)])
        columns = zip(*parts, strict=True)
        return {n: np.concatenate(c) for n, c in zip(self.module.output_names, columns, strict=True)}

    def decisions(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The float reference's decisions inside the network, by node name; see `Deployable.decisions`."""
        import torch

        with torch.inference_mode():
            found = self.module.decisions(torch.from_numpy(np.ascontiguousarray(inputs)))
        return {name: tensor.numpy() for name, tensor in found.items()}


def _weights_hash(module: Deployable) -> str:
    digest = hashlib.sha256()
    for name, tensor in cast("nn.Module", module).state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
