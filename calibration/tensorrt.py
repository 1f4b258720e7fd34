"""Static Q/DQ quantisation of an ONNX graph where TensorRT wants the pairs, by ONNX Runtime."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vitkit.calibration.dataset import CalibrationSet
from vitkit.calibration.onnx import static_qdq
from vitkit.calibration.policy import float_nodes
from vitkit.runtimes.card import ImageSpec

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

METHOD = (
    "onnxruntime static Q/DQ, placed for TensorRT: min-max, symmetric s8 activations, symmetric s8 weights "
    "per channel; Conv, MatMul, Gemm"
)
# The least float16 above zero.
_LEAST_SCALE = np.float32(2**-24)
_PRODUCTS = ("Conv", "MatMul", "Gemm")
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "QuantizeBias": False,
    # A pair behind a product would keep it from fusing with the bias or activation that follows.
    "OpTypesToExcludeOutputQuantization": list(_PRODUCTS),
}


def quantize(
    model: ModelProto, calibration: CalibrationSet, image: ImageSpec, float_modules: Sequence[str]
) -> ModelProto:
    """Put Q/DQ pairs on the inputs of products, attention's too, and on shortcuts; not in the float modules.

    Products with a constant of other than two dimensions stay float: its channels are no single axis.
    """
    constants = {item.name: len(item.dims) for item in model.graph.initializer}
    stacks = [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and any(constants.get(name, 2) != 2 for name in node.input)
    ]
    exclude = {*float_nodes([node.name for node in model.graph.node], float_modules), *stacks}
    quantised = static_qdq(
        model,
        calibration,
        image,
        exclude=sorted(exclude),
        activations="QInt8",
        reduce_range=False,
        options=_OPTIONS,
    )
    _unread(quantised, exclude)
    _raise_scales(quantised)
    _name_by_reader(quantised)
    return quantised


def _unread(model: ModelProto, exclude: set[str]) -> None:
    """Give everything but quantised products and the shortcuts added to them the float values back.

    ONNX Runtime quantises a tensor for all its readers, also for those that must stay float.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    sources = {
        node.output[0]: producers[node.input[0]].input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
    }
    for node in model.graph.node:
        product = node.op_type in _PRODUCTS and node.name not in exclude
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or product:
            continue
        if node.op_type == "Add" and node.name not in exclude and _is_shortcut(node, producers):
            continue
        for i, name in enumerate(node.input):
            node.input[i] = sources.get(name, name)
    _drop_unread(model)


def _raise_scales(model: ModelProto) -> None:
    """Keep the scales of channels that training left almost empty from vanishing in float16."""
    import onnx

    scales = {n.input[1] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for item in model.graph.initializer:
        if item.name in scales:
            raised = np.maximum(onnx.numpy_helper.to_array(item), _LEAST_SCALE)
            item.CopyFrom(onnx.numpy_helper.from_array(raised, item.name))


def _is_shortcut(node: NodeProto, producers: dict[str, NodeProto]) -> bool:
    """Whether an Add joins a convolution with something else that is quantised: both run in one kernel."""
    kinds = sorted(producers[name].op_type if name in producers else "" for name in node.input)
    return kinds == ["Conv", "DequantizeLinear"]


def _drop_unread(model: ModelProto) -> None:
    outputs = {value.name for value in model.graph.output}
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        read = {name for node in model.graph.node for name in node.input} | outputs
        for node in [n for n in model.graph.node if n.op_type == kind and n.output[0] not in read]:
            model.graph.node.remove(node)


def _name_by_reader(model: ModelProto) -> None:
    """Name pairs `<module path>/<operator>` after their first reader, so that float policies hold."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    seen: Counter[str] = Counter(node.name for node in model.graph.node)
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        for node in model.graph.node:
            if node.op_type != kind:
                continue
            # Products come before shortcuts: what only adds may be in a module that stays float.
            users = sorted(readers[node.output[0]], key=lambda user: user.op_type == "Add")
            stem = f"{users[0].name.split('/')[0]}/{kind}"
            seen[stem] += 1
            node.name = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
