"""An ONNX graph in the dialect that a version of TensorRT parses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from vitkit.calibration.policy import float_nodes
from vitkit.exporters.half import CAMERA_MODULE
from vitkit.runtimes.errors import ExportFailed
from vitkit.runtimes.tensorrt_options import Dialect

TRACED = 19
_LOWERED = 17
# Operators that 18 and 19 gave attributes, with the values that mean what 17 does, or only more types.
_ADDED_SINCE: dict[str, dict[str, Any]] = {
    "Cast": {"saturate": 1},
    "Constant": {},
    "Equal": {},
    "Identity": {},
    "Pad": {},
    "Reshape": {},
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "Shape": {},
    "Size": {},
}


def to_dialect(model: ModelProto, dialect: Dialect) -> ModelProto:
    """A copy of a graph of opset `TRACED`, as the dialect wants it; raises ExportFailed."""
    result = ModelProto()
    result.CopyFrom(model)
    # What is known of the values between nodes is inferred again where it is needed.
    del result.graph.value_info[:]
    _cast_bytes_first(result)
    if dialect.opset == _LOWERED:
        _lower(result)
    if not dialect.layer_norm:
        _write_out_layer_norms(result)
    _drop_unused(result)
    return result


def float32_layers(model: ModelProto, float_modules: Sequence[str], *, layer_norms: bool) -> list[str]:
    """Nodes that must stay in float32 where the builder chooses types: those of the float modules.

    With `layer_norms` also what layer norms were written out to: their sums of squares overflow float16.
    Nodes that return anything but float32 are left out, since they have no choice.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    names = [n.name for n in graph.node if all(types.get(o) == TensorProto.FLOAT for o in n.output)]
    keep = set(float_nodes(names, [*float_modules, CAMERA_MODULE]))
    if layer_norms:
        keep |= {name for name in names if name.split("/")[-1].startswith("LayerNormalization")}
    return [name for name in names if name in keep]


def _cast_bytes_first(model: ModelProto) -> None:
    """Move the Cast of a uint8 input before the Reshape it follows: TensorRT reshapes no bytes."""
    images = {v.name for v in model.graph.input if v.type.tensor_type.elem_type == TensorProto.UINT8}
    nodes = list(model.graph.node)
    for reshape in nodes:
        if reshape.op_type != "Reshape" or reshape.input[0] not in images:
            continue
        (cast,) = (node for node in nodes if reshape.output[0] in node.input)
        if cast.op_type != "Cast":
            continue
        for reader in nodes:
            _rewire(reader, cast.output[0], reshape.output[0])
        cast.input[0] = reshape.input[0]
        reshape.input[0] = cast.output[0]
        nodes.remove(cast)
        nodes.insert(nodes.index(reshape), cast)
    _replace_nodes(model, nodes)


def _lower(model: ModelProto) -> None:
    """Opset 19 -> 17. Raises ExportFailed for an operator whose meaning changed otherwise."""
    constants = {item.name: item for item in model.graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    for node in model.graph.node:
        if onnx.defs.get_schema(node.op_type, TRACED).since_version <= _LOWERED:
            continue
        if node.op_type.startswith("Reduce"):
            _lower_reduction(node, constants)
        elif node.op_type == "Split":
            _lower_split(node, shapes)
        elif node.op_type in _ADDED_SINCE:
            for name, value in _ADDED_SINCE[node.op_type].items():
                if (found := _pop(node, name)) not in (None, value):
                    raise _no_equal(node, f"{name} {found!r}")
            if _has_axes(node):
                raise _no_equal(node, "axes")
        else:
            raise _no_equal(node, "another meaning today")
    for item in model.opset_import:
        if not item.domain:
            item.version = _LOWERED


def _lower_reduction(node: NodeProto, constants: dict[str, TensorProto]) -> None:
    """Axes as an attribute instead of an input."""
    if _pop(node, "noop_with_empty_axes") and len(node.input) < 2:
        raise _no_equal(node, "noop_with_empty_axes")
    if len(node.input) > 1:
        axes = constants.get(node.input.pop())
        if axes is None:
            raise _no_equal(node, "computed axes")
        node.attribute.append(
            onnx.helper.make_attribute("axes", onnx.numpy_helper.to_array(axes).ravel().tolist())
        )


def _lower_split(node: NodeProto, shapes: dict[str, list[int]]) -> None:
    """Equal parts need no number in opset 17; unequal ones have their sizes as an input."""
    count, size = _pop(node, "num_outputs"), 0
    if count is None:
        return
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if shape := shapes.get(node.input[0]):
        size = shape[axis]
    if not size or size % count:
        raise _no_equal(node, f"{count} parts of {size or 'unknown size'}")


def _has_axes(node: NodeProto) -> bool:
    """Whether a Pad or Resize names the axes it works on, which opset 17 has not."""
    return (node.op_type == "Pad" and len(node.input) > 3) or any(a.name == "axes" for a in node.attribute)


def _no_equal(node: NodeProto, what: str) -> ExportFailed:
    return ExportFailed(
        f"{node.name} has {what}, which opset {_LOWERED} cannot say; export with --trt-version 11"
    )


def _pop(node: NodeProto, name: str) -> Any:
    """Take an attribute out of a node; None where it has none of that name."""
    for i, attribute in enumerate(node.attribute):
        if attribute.name == name:
            value = onnx.helper.get_attribute_value(attribute)
            del node.attribute[i]
            return value
    return None


def _write_out_layer_norms(model: ModelProto) -> None:
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes += _layer_norm(model, node) if node.op_type == "LayerNormalization" else [node]
    _replace_nodes(model, nodes)


def _layer_norm(model: ModelProto, node: NodeProto) -> list[NodeProto]:
    """LayerNormalization by its definition, in operators of opset 17."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    x, name = node.input[0], node.name
    axes = list(range(values.get("axis", -1), 0))
    if not axes or len(node.output) > 1:
        raise ExportFailed(f"{name} has axis {values['axis']} or several outputs, which is not written out")
    epsilon = f"{name}_epsilon"
    value = np.float32(values.get("epsilon", 1e-5))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), epsilon))

    def make(operator: str, part: str, *inputs: str, **attributes: Any) -> NodeProto:
        return onnx.helper.make_node(operator, inputs, [f"{name}_{part}"], f"{name}_{part}", **attributes)

    nodes = [
        make("ReduceMean", "mean", x, axes=axes, keepdims=1),
        make("Sub", "centred", x, f"{name}_mean"),
        make("Mul", "squares", f"{name}_centred", f"{name}_centred"),
        make("ReduceMean", "variance", f"{name}_squares", axes=axes, keepdims=1),
        make("Add", "positive", f"{name}_variance", epsilon),
        make("Sqrt", "deviation", f"{name}_positive"),
        make("Div", "normal", f"{name}_centred", f"{name}_deviation"),
        make("Mul", "scaled", f"{name}_normal", node.input[1]),
    ]
    if len(node.input) > 2 and node.input[2]:
        nodes.append(make("Add", "shifted", f"{name}_scaled", node.input[2]))
    nodes[-1].name, nodes[-1].output[0] = name, node.output[0]
    return nodes


def _rewire(node: NodeProto, before: str, after: str) -> None:
    for i, name in enumerate(node.input):
        if name == before:
            node.input[i] = after


def _replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    kept = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _drop_unused(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
