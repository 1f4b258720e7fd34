"""Reading an ONNX file: which operators it holds, in which precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
from onnx import TensorProto

from vitkit.runtimes.errors import BadArtifact

_NAMES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
_LAYOUT = frozenset(("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Concat", "Expand"))


def operators(path: Path) -> Counter[tuple[str, str]]:
    """(operator, precision) -> count. An operator whose data comes out of DequantizeLinear is int8."""
    # The vendor raises protobuf's own types for files that are no model.
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(path))
    except Exception as error:
        raise BadArtifact(f"{path} cannot be read as ONNX: {error}") from None
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    dequantised = {
        name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output
    }
    counts: Counter[tuple[str, str]] = Counter()
    for node in model.graph.node:
        quantised = node.op_type in ("QuantizeLinear", "DequantizeLinear") or (
            node.op_type not in _LAYOUT and len(node.input) > 1 and set(node.input[:2]) <= dequantised
        )
        kind = _NAMES.get(types.get(node.output[0], TensorProto.FLOAT), "integer")
        counts[node.op_type, "int8" if quantised else kind] += 1
    return counts
