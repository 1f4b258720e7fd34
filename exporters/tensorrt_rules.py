"""What TensorRT's ONNX parser takes, version by version, as a table of rules.

TensorRT cannot be asked without a GPU, and some of what it does not support it computes wrongly without a
word. The operators are those that the parser's own lists name; one that is not listed here is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

VERSIONS = ("8.5", "8.6", "10", "11")
HIGHEST_OPSET = {"8.5": 17, "8.6": 17, "10": 20, "11": 25}
_ALL = frozenset(VERSIONS)
_OLD = frozenset(("8.5", "8.6"))

_OPERATORS_8_5 = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu
Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div
Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm
GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish
Identity If InstanceNormalization IsNaN LRN LSTM LeakyRelu Less LessOrEqual Log LogSoftmax Loop
LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression
NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round Scan
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where
Xor
"""
_NEW_IN_8_6 = "GroupNormalization IsInf LayerNormalization"
_NEW_IN_10 = "Gelu Hardmax"
OPERATORS = {
    "8.5": frozenset(_OPERATORS_8_5.split()),
    "8.6": frozenset(f"{_OPERATORS_8_5} {_NEW_IN_8_6}".split()),
    "10": frozenset(f"{_OPERATORS_8_5} {_NEW_IN_8_6} {_NEW_IN_10}".split()),
    "11": frozenset(f"{_OPERATORS_8_5} {_NEW_IN_8_6} {_NEW_IN_10}".split()),
}

_FLOATS = frozenset((TensorProto.FLOAT, TensorProto.FLOAT16))
_TYPES_8 = _FLOATS | {TensorProto.INT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
_TYPES_10 = _TYPES_8 | {TensorProto.BFLOAT16}
TYPES = {"8.5": _TYPES_8, "8.6": _TYPES_8, "10": _TYPES_10, "11": _TYPES_10}
_ARG_TYPES = {
    "8.5": _FLOATS,
    "8.6": _FLOATS | {TensorProto.INT32},
    "10": _FLOATS | {TensorProto.INT32, TensorProto.INT64},
    "11": _FLOATS | {TensorProto.INT32, TensorProto.INT64},
}
_RESIZE_COORDINATES = frozenset(
    ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
)
_TOP_K_LIMIT = 3840
_FP16_SCALE_OPSET = 19

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_REDUCTIONS = tuple(sorted(name for name in OPERATORS["8.5"] if name.startswith("Reduce")))


class Violation(NamedTuple):
    """A node that a version of TensorRT would refuse or compute wrongly, and the rule that says so."""

    rule: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.node}: {self.reason}"


class Rule(NamedTuple):
    """A row of `RULES`: its name, the versions and operators (none: all) it is for, and its check."""

    name: str
    versions: frozenset[str]
    operators: tuple[str, ...]
    check: Callable[[_Graph, NodeProto], Iterator[str]]


class _Graph:
    """A model with what its rules ask for: constants, types, shapes, and who makes and reads a tensor."""

    def __init__(self, model: ModelProto, version: str) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        self.version = version
        self.opset = next((item.version for item in model.opset_import if not item.domain), 0)
        self.nodes = list(graph.node)
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self._initializers = {item.name: item for item in graph.initializer}
        self.types = {item.name: item.data_type for item in graph.initializer}
        self.shapes: dict[str, list[int | None]] = {i.name: list(i.dims) for i in graph.initializer}
        for value in (*graph.value_info, *graph.input, *graph.output):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                dims = tensor.shape.dim
                self.shapes[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in dims]
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of an initializer or of a Constant node; None for what is computed."""
        if name in self._initializers:
            array: NDArray[Any] = onnx.numpy_helper.to_array(self._initializers[name])
            return array
        node = self.producer.get(name)
        if node is None or node.op_type != "Constant" or node.attribute[0].name != "value":
            return None
        value: NDArray[Any] = onnx.numpy_helper.to_array(node.attribute[0].t)
        return value

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer or a Constant node's."""
        return name in self._initializers or self.constant(name) is not None


def check(model: ModelProto, version: str) -> list[Violation]:
    """Everything in a graph that a version of TensorRT (one of `VERSIONS`) cannot take."""
    graph = _Graph(model, version)
    found = []
    if not 1 <= graph.opset <= HIGHEST_OPSET[version]:
        reason = f"opset {graph.opset}; TensorRT {version} reads up to {HIGHEST_OPSET[version]}"
        found.append(Violation("opset", model.graph.name, reason))
    for rule in RULES:
        if version not in rule.versions:
            continue
        for node in graph.nodes:
            if not rule.operators or node.op_type in rule.operators:
                where = node.name or f"{node.op_type} that makes {node.output[0]}"
                found += [Violation(rule.name, where, reason) for reason in rule.check(graph, node)]
    return found


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    value = next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
    return value.decode() if isinstance(value, bytes) else value


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()


def _operator(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"{node.domain}.{node.op_type} is not one of ONNX's own operators"
    elif node.op_type not in OPERATORS[graph.version]:
        yield f"TensorRT {graph.version} has no {node.op_type}"


def _type(graph: _Graph, node: NodeProto) -> Iterator[str]:
    for name in (*node.input, *node.output):
        kind = graph.types.get(name, 0)
        # Unsigned bytes have a rule of their own.
        if kind not in (0, TensorProto.UINT8) and kind not in TYPES[graph.version]:
            yield f"{name} is {_type_name(kind)}, which TensorRT {graph.version} has not"


def _uint8(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if node.op_type in _QDQ:
        return
    for name in node.input:
        if graph.types.get(name) == TensorProto.UINT8 and not (
            node.op_type == "Cast"
            and name in graph.inputs
            and graph.types.get(node.output[0]) in (*_FLOATS, 0, None)
        ):
            yield f"{name} is uint8; an input of bytes must go into a Cast to a float type first"
    for name in node.output:
        if graph.types.get(name) == TensorProto.UINT8 and name not in graph.outputs:
            yield f"{name} is uint8, which only the inputs and outputs of a network may be"


def _layer_norm_outputs(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if len([name for name in node.output if name]) > 1:
        yield "TensorRT computes the first output only"


def _grid_sample_rank(graph: _Graph, node: NodeProto) -> Iterator[str]:
    shape = graph.shapes.get(node.input[0])
    if shape is not None and len(shape) != 4:
        yield f"samples {len(shape)} dimensions; TensorRT samples maps of 4"


def _grid_sample_opset(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if graph.opset >= 20:
        yield f"of opset {graph.opset}: TensorRT takes its 'linear' for nearest without a word"


def _einsum(graph: _Graph, node: NodeProto) -> Iterator[str]:
    equation = str(_attribute(node, "equation", "")).replace(" ", "")
    if "..." in equation:
        yield f"{equation} has an ellipsis"
        return
    terms = equation.split("->")[0].split(",")
    if any(len(set(term)) < len(term) for term in terms):
        yield f"{equation} takes a diagonal"
    sizes: dict[str, set[int | None]] = defaultdict(set)
    for term, name in zip(terms, node.input, strict=False):
        for letter, size in zip(term, graph.shapes.get(name, ()), strict=False):
            sizes[letter].add(size)
    if wide := sorted(letter for letter, found in sizes.items() if 1 in found and len(found) > 1):
        yield f"{equation} broadcasts {', '.join(wide)}"


def _arg_type(graph: _Graph, node: NodeProto) -> Iterator[str]:
    kind = graph.types.get(node.input[0], 0)
    if kind and kind not in _ARG_TYPES[graph.version]:
        yield f"searches {_type_name(kind)}, which TensorRT {graph.version} cannot"


def _one_hot_depth(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if not graph.is_constant(node.input[1]):
        yield "its depth is computed; it must be a constant"


def _top_k_constant(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if not graph.is_constant(node.input[1]):
        yield "its K is computed; it must be a constant"


def _top_k_size(graph: _Graph, node: NodeProto) -> Iterator[str]:
    count = graph.constant(node.input[1])
    if count is not None and count.max() >= _TOP_K_LIMIT:
        yield f"K is {int(count.max())}; it must be under {_TOP_K_LIMIT}"


def _resize_mode(graph: _Graph, node: NodeProto) -> Iterator[str]:
    mode = _attribute(node, "mode", "nearest")
    modes = ("nearest", "linear") if graph.version in _OLD else ("nearest", "linear", "cubic")
    if mode not in modes:
        yield f"mode {mode}; TensorRT {graph.version} has {', '.join(modes)}"
    rule = _attribute(node, "coordinate_transformation_mode", "half_pixel")
    if rule not in _RESIZE_COORDINATES:
        yield f"coordinates {rule}; TensorRT has {', '.join(sorted(_RESIZE_COORDINATES))}"


def _resize_antialias(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if _attribute(node, "antialias", 0):
        yield "antialias, which TensorRT has not"


def _reduce_axes(graph: _Graph, node: NodeProto) -> Iterator[str]:
    # ReduceSum has had its axes as an input since opset 13, and TensorRT 8.5 reads them.
    if node.op_type != "ReduceSum" and len(node.input) > 1:
        yield "its axes are an input, which TensorRT 8.5 ignores: it reduces all axes"


def _scatter_reduction(graph: _Graph, node: NodeProto) -> Iterator[str]:
    reduction = _attribute(node, "reduction", "none")
    if reduction != "none":
        yield f"reduction {reduction}, which TensorRT {graph.version} ignores"


def _qdq_zero_point(graph: _Graph, node: NodeProto) -> Iterator[str]:
    name = node.input[2] if len(node.input) > 2 else ""
    value = graph.constant(name)
    if not name:
        yield "has no zero point"
    elif value is None:
        yield "its zero point is computed; it must be a constant"
    elif np.any(value != 0):
        yield f"zero point {value.ravel()[np.flatnonzero(value)[0]]}; TensorRT is symmetric: it must be 0"


def _qdq_type(graph: _Graph, node: NodeProto) -> Iterator[str]:
    name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
    kind = graph.types.get(name, TensorProto.INT8)
    if kind != TensorProto.INT8:
        yield f"{name} is {_type_name(kind)}; TensorRT quantises to int8"


def _qdq_scale(graph: _Graph, node: NodeProto) -> Iterator[str]:
    scale = graph.constant(node.input[1])
    if scale is None:
        yield "its scale is computed; it must be a constant"
    elif not (np.all(scale > 0) and np.all(np.isfinite(scale))):
        yield "a scale is not positive"


def _qdq_scale_type(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if graph.types.get(node.input[1]) == TensorProto.FLOAT16 and graph.opset < _FP16_SCALE_OPSET:
        yield f"a float16 scale needs opset {_FP16_SCALE_OPSET}, the graph has {graph.opset}"


def _source_of(graph: _Graph, node: NodeProto) -> str:
    """The tensor that a Q node, or the Q node before a DQ node, quantises."""
    if node.op_type == "DequantizeLinear":
        before = graph.producer.get(node.input[0])
        if before is not None and before.op_type == "QuantizeLinear":
            return str(before.input[0])
    return str(node.input[0])


def _qdq_per_axis(graph: _Graph, node: NodeProto) -> Iterator[str]:
    scale, source = graph.constant(node.input[1]), _source_of(graph, node)
    if scale is not None and scale.size > 1 and not graph.is_constant(source):
        yield f"{scale.size} scales for {source}; only weights may have one for each channel"


def _qdq_pair(graph: _Graph, node: NodeProto) -> Iterator[str]:
    if node.op_type == "QuantizeLinear":
        readers = graph.consumers[node.output[0]]
        if node.output[0] in graph.outputs or any(r.op_type != "DequantizeLinear" for r in readers):
            yield "only DequantizeLinear may read what QuantizeLinear makes"
        return
    before = graph.producer.get(node.input[0])
    quantised = before is not None and before.op_type == "QuantizeLinear"
    if not quantised and (graph.version in _OLD or not graph.is_constant(node.input[0])):
        yield f"{node.input[0]} does not come from QuantizeLinear"


def _qdq_bias(graph: _Graph, node: NodeProto) -> Iterator[str]:
    before = graph.producer.get(node.input[2]) if len(node.input) > 2 else None
    if before is not None and before.op_type == "DequantizeLinear":
        yield "its bias is quantised; TensorRT adds it in float"


def _qdq_output(graph: _Graph, node: NodeProto) -> Iterator[str]:
    """A pair behind a product keeps it from fusing with the activation or bias that follows."""
    before = graph.producer.get(node.input[0])
    if before is None or before.op_type not in _PRODUCTS:
        return
    for pair in graph.consumers[node.output[0]]:
        for reader in graph.consumers[pair.output[0]]:
            shortcut = reader.op_type == "Add" and not any(map(graph.is_constant, reader.input))
            if reader.op_type not in _PRODUCTS and not shortcut:
                yield f"stands between {before.op_type} {before.name} and {reader.op_type} {reader.name}"


RULES = (
    Rule("operator", _ALL, (), _operator),
    Rule("type", _ALL, (), _type),
    Rule("uint8", _ALL, (), _uint8),
    Rule("layer-norm-outputs", _ALL - {"8.5"}, ("LayerNormalization",), _layer_norm_outputs),
    Rule("grid-sample-rank", _ALL, ("GridSample",), _grid_sample_rank),
    Rule("grid-sample-opset", _ALL, ("GridSample",), _grid_sample_opset),
    # TensorRT 10.12 lifts it, JetPack 6 has 10.3.
    Rule("einsum", _ALL - {"11"}, ("Einsum",), _einsum),
    Rule("arg-type", _ALL, ("ArgMax", "ArgMin", "TopK"), _arg_type),
    Rule("one-hot-depth", _ALL, ("OneHot",), _one_hot_depth),
    Rule("top-k-constant", _OLD, ("TopK",), _top_k_constant),
    Rule("top-k-size", _ALL, ("TopK",), _top_k_size),
    Rule("resize-mode", _ALL, ("Resize",), _resize_mode),
    Rule("resize-antialias", _ALL, ("Resize",), _resize_antialias),
    Rule("reduce-axes", frozenset(("8.5",)), _REDUCTIONS, _reduce_axes),
    Rule("scatter-reduction", _OLD, ("ScatterElements", "ScatterND"), _scatter_reduction),
    Rule("qdq-zero-point", _ALL, _QDQ, _qdq_zero_point),
    Rule("qdq-type", _ALL, _QDQ, _qdq_type),
    Rule("qdq-scale", _ALL, _QDQ, _qdq_scale),
    Rule("qdq-scale-type", _ALL, _QDQ, _qdq_scale_type),
    Rule("qdq-per-axis", _ALL, _QDQ, _qdq_per_axis),
    Rule("qdq-pair", _ALL, _QDQ, _qdq_pair),
    Rule("qdq-bias", _ALL, ("Conv", "ConvTranspose", "Gemm"), _qdq_bias),
    Rule("qdq-output", _ALL, ("QuantizeLinear",), _qdq_output),
)
