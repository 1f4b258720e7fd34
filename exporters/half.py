"""Half precision for an ONNX graph, with the float modules left in float32.

ONNX Runtime's own converter is not used: it writes one cast per consumer under the same name and leaves
stale types, both of which ONNX's checker refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitkit.calibration.policy import float_nodes

if TYPE_CHECKING:
    import onnx_ir
    from onnx import ModelProto

# Pixels 0..255 less their mean lose three bits in half precision, so normalisation stays float.
CAMERA_MODULE = "camera"


def to_half(model: ModelProto, float_modules: Sequence[str]) -> ModelProto:
    """Turn weights and arithmetic to float16; inputs, outputs and the float modules stay float32."""
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common

    typed = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    nodes = list(typed.graph)
    keep = set(float_nodes([str(node.name) for node in nodes], [*float_modules, CAMERA_MODULE]))
    opset = typed.opset_imports[""]
    _halve_outputs(node for node in nodes if node.name not in keep)
    casts = _Casts(typed.graph)
    for node in nodes:
        for i, value in enumerate(node.inputs):
            stays = node.name in keep or _must_be_float(onnx.defs.get_schema(node.op_type, opset, ""), i)
            wanted = ir.DataType.FLOAT if stays else ir.DataType.FLOAT16
            floating = value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
            if floating and value.dtype != wanted and node.op_type != "Cast":
                node.replace_input_with(i, casts.get(value, wanted))
    for i, value in enumerate(typed.graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            output = casts.get(value, ir.DataType.FLOAT)
            output.name, value.name = value.name, f"{value.name}:float16"
            typed.graph.outputs[i] = output
    # The casts were appended at the end of the graph.
    for tidy in (common.TopologicalSortPass(), common.RemoveUnusedNodesPass()):
        tidy(typed)
    common.ClearMetadataAndDocStringPass()(typed)
    proto: ModelProto = ir.to_proto(typed)
    return proto


def _must_be_float(schema: Any, place: int) -> bool:
    """Whether an operator takes an input in float32 alone, such as the scales of Resize."""
    # The last one may stand for any number of inputs.
    kinds = schema.inputs[min(place, len(schema.inputs) - 1)].types
    return "tensor(float)" in kinds and "tensor(float16)" not in kinds


def _halve_outputs(nodes: Any) -> None:
    import onnx_ir as ir

    for node in nodes:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16.value)
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.dtype = ir.DataType.FLOAT16


class _Casts:
    """Values in another float type: a converted copy of a weight, one shared cast of anything else."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._made: dict[str, onnx_ir.Value] = {}

    def get(self, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        name = f"{value.name}:{dtype.name.lower()}"
        if name not in self._made:
            made = self._weight if value.const_value is not None else self._cast
            self._made[name] = made(value, dtype, name)
            self._made[name].dtype, self._made[name].shape = dtype, value.shape
        return self._made[name]

    def _weight(self, value: onnx_ir.Value, dtype: onnx_ir.DataType, name: str) -> onnx_ir.Value:
        import onnx_ir as ir

        array = value.const_value.numpy().astype(dtype.numpy())
        made = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: onnx_ir.Value, dtype: onnx_ir.DataType, name: str) -> onnx_ir.Value:
        import onnx_ir as ir

        cast = ir.node("Cast", [value], attributes={"to": dtype.value}, name=f"{name}/Cast")
        cast.outputs[0].name = name
        self._graph.append(cast)
        return cast.outputs[0]
