"""Reading ONNX files that others made: what is taken of them, and all else refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.reading import read_file

OLDEST_OPSET = 9
# Protocol buffers, the format of ONNX files, end at 2 GiB; an engine's graph is a little larger than its
# file.
_MAX_BYTES = 2_000_000_000
# Operators that a message names.
_SHOWN = 5
_OWN_DOMAINS = ("", "ai.onnx")
_REFUSED = (
    (
        {
            "Bernoulli",
            "Multinomial",
            "RandomNormal",
            "RandomNormalLike",
            "RandomUniform",
            "RandomUniformLike",
        },
        "draws random numbers, so that no two runs agree: export the network after model.eval()",
    ),
    (
        {
            "ConvInteger",
            "DequantizeLinear",
            "DynamicQuantizeLinear",
            "MatMulInteger",
            "QLinearConv",
            "QLinearMatMul",
            "QuantizeLinear",
        },
        "is quantised already; vitkit quantises float networks itself: give the float32 file",
    ),
    (
        {
            "ConcatFromSequence",
            "Optional",
            "OptionalGetElement",
            "OptionalHasElement",
            "SequenceAt",
            "SequenceConstruct",
            "SequenceEmpty",
            "SequenceErase",
            "SequenceInsert",
            "SequenceLength",
            "SequenceMap",
            "SplitToSequence",
        },
        "makes or reads a sequence or an optional value, which edge engines do not have: "
        "export the network with tensors alone",
    ),
)
_HALF = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "float64"}


class ImageInput(NamedTuple):
    """The one input of a network: images of `layout` NCHW or NHWC, float32 or uint8.

    Of `size` (height, width) and `batch` None is what the file leaves open. `layout_open` means that the file
    leaves the number of channels open, so that NCHW is an assumption.
    """

    name: str
    layout: str
    dtype: str
    size: tuple[int | None, int | None]
    batch: int | None
    layout_open: bool = False


def read_onnx(path: Path) -> ModelProto:
    """The network of an ONNX file, with weights from other files and its own functions put in their places.

    Raises BadInput for what is no ONNX file, is too large or incomplete, or uses what no engine has.
    """
    model = _parsed(path)
    _load_weights(model, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_opset(model, path)
    _check_operators(model, path)
    _check_types(model, path)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise BadInput(f"{path} does not pass ONNX's checker: {error}") from None
    return model


def weight_files(path: Path) -> list[Path]:
    """The other files that hold an ONNX file's weights."""
    return sorted({path.parent / location for location in _locations(_parsed(path))})


def opset_of(model: ModelProto) -> int:
    """The version of ONNX's own operators that a graph declares; 0 if none."""
    return max((item.version for item in model.opset_import if item.domain in _OWN_DOMAINS), default=0)


def image_input(model: ModelProto, path: Path) -> ImageInput:
    """The input of a network that takes images. Raises BadInput if it has others, or more than one."""
    inputs = real_inputs(model.graph)
    if len(inputs) != 1:
        raise BadInput(
            f"{path} has {len(inputs)} inputs, {', '.join(map(_described, inputs)) or 'none'}; an engine "
            "takes one image: export the network with the others fixed inside"
        )
    value = inputs[0]
    kinds = {TensorProto.FLOAT: "float32", TensorProto.UINT8: "uint8"}
    dims = _dims(value)
    if value.type.tensor_type.elem_type not in kinds:
        raise BadInput(f"{path} takes {_described(value)}; images are float32 or uint8: export it in float32")
    channels = {layout: dims[place] for layout, place in (("NCHW", 1), ("NHWC", 3)) if len(dims) == 4}
    fitting = [layout for layout, count in channels.items() if count == 3] or [
        layout for layout, count in channels.items() if count is None
    ]
    if not fitting:
        raise BadInput(
            f"{path} takes {_described(value)}; an image input is (batch, 3, height, width) or "
            "(batch, height, width, 3), RGB or BGR"
        )
    layout = fitting[0]
    size = (dims[2], dims[3]) if layout == "NCHW" else (dims[1], dims[2])
    dtype = kinds[value.type.tensor_type.elem_type]
    return ImageInput(value.name, layout, dtype, size, dims[0], layout_open=channels[layout] is None)


def real_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """The inputs that are no weights: old files list these too."""
    weights = {item.name for item in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of the graphs inside them."""
    for part in _graphs(graph):
        yield from part.node


def named(nodes: Sequence[NodeProto]) -> str:
    """Nodes for a message: their operators, and the names of a few."""
    shown = [f"{_operator(node)} ({(node.name or node.output[0])!r})" for node in nodes[:_SHOWN]]
    more = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    return ", ".join(shown) + more


def _operator(node: NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in _OWN_DOMAINS else str(node.op_type)


def _parsed(path: Path) -> ModelProto:
    try:
        content = read_file(path, _MAX_BYTES)
    except OSError as error:
        large = path.is_file() and path.stat().st_size > _MAX_BYTES
        raise BadInput(_too_large(path, path.stat().st_size) if large else f"cannot read {error}") from None
    # The vendor raises protobuf's own types.
    try:
        model: ModelProto = onnx.load_model_from_string(content)
    except Exception as error:
        raise BadInput(f"{path} is no ONNX file: {error}") from None
    if not model.graph.node or not model.opset_import:
        raise BadInput(f"{path} is no ONNX file, or an empty one: it holds {len(model.graph.node)} operators")
    return model


def _too_large(path: Path, size: int) -> str:
    return (
        f"{path} holds a network of {size / 1e9:.2f} GB; graphs of ONNX, and so what is made of them, end at "
        "2 GB, the limit of protocol buffers: use a smaller network"
    )


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for node in graph.node:
            yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _locations(model: ModelProto) -> dict[str, int]:
    """Other files that hold weights -> bytes that are read from them; 0 where the file has the number."""
    found: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {item.key: item.value for item in tensor.external_data}
            location, length = entries.get("location", ""), entries.get("length", "0")
            found[location] = found.get(location, 0) + (int(length) if length.isdigit() else 0)
    return found


def _load_weights(model: ModelProto, path: Path) -> None:
    """Put weights from other files into the model; raises BadInput if one is missing or too short."""
    locations = _locations(model)
    if not locations:
        return
    if missing := sorted(name for name in locations if not (path.parent / name).is_file()):
        shown = ", ".join(missing[:_SHOWN]) + (
            f" and {len(missing) - _SHOWN} more" if missing[_SHOWN:] else ""
        )
        raise BadInput(
            f"{path} keeps weights in other files, of which {shown} {'is' if len(missing) == 1 else 'are'} "
            f"missing: copy them into {path.parent}, under the same names"
        )
    total = sum(length or (path.parent / name).stat().st_size for name, length in locations.items())
    if total + path.stat().st_size > _MAX_BYTES:
        raise BadInput(_too_large(path, total + path.stat().st_size))
    # The vendor raises several types for files that are too short, and for places outside the folder.
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise BadInput(f"the weights of {path} in {', '.join(locations)} cannot be read: {error}") from None


def _check_opset(model: ModelProto, path: Path) -> None:
    opset, newest = opset_of(model), onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise BadInput(
            f"{path} has opset {opset}; files of opset {OLDEST_OPSET} and later are read: export it again "
            "with a later opset"
        )
    if opset > newest:
        raise BadInput(
            f"{path} has opset {opset}, the onnx package here reads up to {newest}: upgrade it with: "
            "pip install --upgrade onnx"
        )


def _check_operators(model: ModelProto, path: Path) -> None:
    nodes, opset = list(all_nodes(model.graph)), opset_of(model)
    if custom := [node for node in nodes if node.domain not in _OWN_DOMAINS]:
        theirs = any(node.domain.startswith("com.microsoft") for node in custom)
        raise BadInput(
            f"{path} has custom operators, {named(custom)}; engines have ONNX's own alone: "
            + ("give the file from before ONNX Runtime's optimiser" if theirs else "export it without them")
        )
    if unknown := [node for node in nodes if not _is_known(node, opset)]:
        raise BadInput(f"{path} has operators that ONNX has not in opset {opset}: {named(unknown)}")
    for operators, reason in _REFUSED:
        if found := [node for node in nodes if node.op_type in operators]:
            raise BadInput(f"{path}: {named(found)} {reason}")
    constants = _constants(model)
    if training := [node for node in nodes if _is_training(node, opset, constants)]:
        raise BadInput(
            f"{path}: {named(training)} is in training mode: export the network after model.eval()"
        )


def _is_known(node: NodeProto, opset: int) -> bool:
    try:
        onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def _constants(model: ModelProto) -> dict[str, TensorProto]:
    found = {item.name: item for graph in _graphs(model.graph) for item in graph.initializer}
    for node in all_nodes(model.graph):
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = node.attribute[0].t
    return found


def _is_training(node: NodeProto, opset: int, constants: dict[str, TensorProto]) -> bool:
    if node.op_type == "BatchNormalization":
        # Before opset 14, statistics of the batch are outputs of training alone.
        mode = next((a.i for a in node.attribute if a.name == "training_mode"), 0)
        return bool(mode) or (opset < 14 and len([name for name in node.output if name]) > 1)
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        mode = constants.get(node.input[2])
        return mode is None or bool(onnx.numpy_helper.to_array(mode).any())
    return False


def _check_types(model: ModelProto, path: Path) -> None:
    """Refuse weights in another type than float32; of constants with one value it does not matter."""
    for kind, name in _HALF.items():
        weights = (tensor for tensor in _tensors(model) if tensor.data_type == kind)
        if found := [tensor.name for tensor in weights if any(dim > 1 for dim in tensor.dims)]:
            raise BadInput(
                f"{path} holds {len(found)} weights in {name}, such as {found[0]!r}; the reference is a "
                "network in float32: export it from model.float()"
            )


def _dims(value: ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]


def _described(value: ValueInfoProto) -> str:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return f"{value.name}: {str(kind).removesuffix('_type')}"
    dims = ", ".join("any" if dim is None else str(dim) for dim in _dims(value))
    return f"{value.name}: {TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()} [{dims}]"
