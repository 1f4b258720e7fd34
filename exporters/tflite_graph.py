"""Reading, shortening and writing TFLite files as the vendor's object tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_IDENTIFIER = b"TFL3"
# What the format asks of constants; the vendor's Python writer puts them anywhere.
_ALIGNMENT = 16
_CHANNELS_FIRST, _CHANNELS_LAST, _SWAP = (0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1)


def read_model(content: bytes) -> Any:
    """A file's content -> the vendor's object tree, with constants that lie outside the tree put into it."""
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model_from_bytearray(content)


def write_model(model: Any) -> bytes:
    """The vendor's object tree -> a file's content, constants aligned as the format asks."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    class Aligned(schema.BufferT):  # type: ignore[misc]
        data: Any

        def Pack(self, builder: Any) -> Any:
            if self.data is not None:
                builder.Prep(_ALIGNMENT, len(self.data))
            return super().Pack(builder)

    for buffer in model.buffers:
        buffer.__class__ = Aligned
        if buffer.data is not None:
            buffer.data = np.frombuffer(buffer.data, np.uint8)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def kind_of(model: Any, step: Any) -> str:
    """The operator in the format's words, such as ARG_MAX."""
    from ai_edge_litert import schema_py_generated as schema

    code = model.operatorCodes[step.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    (name,) = (name for name, value in vars(schema.BuiltinOperator).items() if value == number)
    return str(name)


def is_constant(model: Any, place: int) -> bool:
    """Whether a tensor's values lie in the file."""
    return model.buffers[model.subgraphs[0].tensors[place].buffer].data is not None


def append_operator(
    model: Any, kind: str, inputs: Sequence[int], shape: Sequence[int], like: int, options: Any, name: str
) -> int:
    """Add an operator at the end; its result has `shape` and the type of tensor `like`. Returns its place."""
    from ai_edge_litert import schema_py_generated as schema

    graph, step = model.subgraphs[0], schema.OperatorT()
    graph.tensors.append(_tensor(name, shape, graph.tensors[like].type, buffer=0))
    set_operator(model, step, kind, inputs, options)
    step.outputs = [len(graph.tensors) - 1]
    graph.operators.append(step)
    return len(graph.tensors) - 1


def set_operator(model: Any, step: Any, kind: str, inputs: Sequence[int], options: Any) -> None:
    """Make an operator one of another kind, on other inputs; its results stay."""
    from ai_edge_litert import schema_py_generated as schema

    number = getattr(schema.BuiltinOperator, kind)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    if number not in codes:
        code = schema.OperatorCodeT()
        # Codes above 127 have one field only.
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 1
        model.operatorCodes.append(code)
        codes.append(number)
    step.opcodeIndex, step.inputs = codes.index(number), list(inputs)
    step.builtinOptions = options
    step.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))


def add_constant(model: Any, values: Sequence[int], name: str) -> int:
    """Add a vector of int32 and return its place."""
    from ai_edge_litert import schema_py_generated as schema

    buffer, graph = schema.BufferT(), model.subgraphs[0]
    buffer.data = np.frombuffer(np.asarray(values, np.int32).tobytes(), np.uint8)
    model.buffers.append(buffer)
    graph.tensors.append(_tensor(name, [len(values)], schema.TensorType.INT32, len(model.buffers) - 1))
    return len(graph.tensors) - 1


def _tensor(name: str, shape: Sequence[int], kind: int, buffer: int) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name.encode(), list(shape), kind, buffer
    return tensor


def shorten(model: Any) -> None:
    """Take out what the converter leaves of torch's own ways; the results are the same.

    It computes channels last, but turns a map over where torch slices or flattens it, and back after that.
    It pads for a maximum with the least number there is, which has no place in INT8.
    """
    graph = model.subgraphs[0]
    for step in list(graph.operators):
        if kind_of(model, step) == "STRIDED_SLICE":
            _slice_before_turning(model, step)
    makers = {place: step for step in graph.operators for place in step.outputs}
    for step in graph.operators:
        if kind_of(model, step) == "TRANSPOSE":
            _skip_round_trip(model, step, makers)
        elif kind_of(model, step) == "PADV2":
            _pad_with_zeros(model, step, makers)
    _drop_unused(model)


def _slice_before_turning(model: Any, step: Any) -> None:
    """TRANSPOSE, STRIDED_SLICE -> the slice of what was not turned yet, then the turn."""
    from ai_edge_litert import schema_py_generated as schema

    graph, options = model.subgraphs[0], step.builtinOptions
    turn: Any = next((other for other in graph.operators if step.inputs[0] in other.outputs), None)
    if turn is None or kind_of(model, turn) != "TRANSPOSE" or not _plain(options):
        return
    order = _values(model, turn.inputs[1])
    limits = [limit for place in step.inputs[1:] if (limit := _values(model, place)) is not None]
    if order is None or len(limits) < 3:
        return
    name = graph.tensors[step.outputs[0]].name.decode()
    # Axis i of what is turned is axis order[i] of what is not.
    back = sorted(range(len(order)), key=order.__getitem__)
    permuted = [
        add_constant(model, [limit[i] for i in back], f"{name};{word}")
        for word, limit in zip(("begin", "end", "step"), limits, strict=True)
    ]
    shape = [int(graph.tensors[step.outputs[0]].shape[i]) for i in back]
    sliced = append_operator(
        model, "STRIDED_SLICE", [turn.inputs[0], *permuted], shape, turn.inputs[0], options, name
    )
    graph.operators.insert(graph.operators.index(step), graph.operators.pop())
    set_operator(model, step, "TRANSPOSE", [sliced, turn.inputs[1]], schema.TransposeOptionsT())


def _plain(options: Any) -> bool:
    masks = ("beginMask", "endMask", "ellipsisMask", "newAxisMask", "shrinkAxisMask", "offset")
    return not any(getattr(options, mask) for mask in masks)


def _skip_round_trip(model: Any, step: Any, makers: dict[int, Any]) -> None:
    """TRANSPOSE, RESHAPE, TRANSPOSE that only join or part rows and columns -> RESHAPE."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    middle: Any = makers.get(step.inputs[0])
    first = makers.get(middle.inputs[0]) if middle is not None else None
    if first is None or [kind_of(model, other) for other in (first, middle)] != ["TRANSPOSE", "RESHAPE"]:
        return
    orders = (_values(model, first.inputs[1]), _values(model, step.inputs[1]))
    before, between, after = (
        [int(size) for size in graph.tensors[place].shape]
        for place in (first.inputs[0], middle.outputs[0], step.outputs[0])
    )
    joins = orders == (_CHANNELS_FIRST, _SWAP) and len(between) == 3
    parts = orders == (_SWAP, _CHANNELS_LAST) and len(between) == 4
    # Images and channels must each stay a dimension of their own.
    if (joins or parts) and between[:2] == [before[0], before[-1]]:
        options = schema.ReshapeOptionsT()
        options.newShape = after
        shape = add_constant(model, after, graph.tensors[step.outputs[0]].name.decode() + ";shape")
        set_operator(model, step, "RESHAPE", [first.inputs[0], shape], options)


def _pad_with_zeros(model: Any, step: Any, makers: dict[int, Any]) -> None:
    """PADV2 between a ReLU and a maximum -> PAD: zeros are no more than what they are compared with."""
    from ai_edge_litert import schema_py_generated as schema

    source: Any = makers.get(step.inputs[0])
    readers = [other for other in model.subgraphs[0].operators if step.outputs[0] in other.inputs]
    if source is None or kind_of(model, source) != "CONV_2D":
        return
    relu = source.builtinOptions.fusedActivationFunction == schema.ActivationFunctionType.RELU
    if relu and readers and all(kind_of(model, other) == "MAX_POOL_2D" for other in readers):
        set_operator(model, step, "PAD", step.inputs[:2], schema.PadOptionsT())


def _drop_unused(model: Any) -> None:
    """Drop operators whose results nobody reads, until there are none, and then their tensors."""
    graph = model.subgraphs[0]
    while True:
        read = {place for step in graph.operators for place in step.inputs} | set(graph.outputs)
        kept = [step for step in graph.operators if read & set(step.outputs)]
        if len(kept) == len(graph.operators):
            break
        graph.operators = kept
    used = read | set(graph.inputs) | {place for step in kept for place in step.outputs}
    # Minus one stands for an input that is left out.
    moved = {old: new for new, old in enumerate(sorted(used - {-1}))} | {-1: -1}
    graph.tensors = [tensor for place, tensor in enumerate(graph.tensors) if place in moved]
    for item in (graph, *kept):
        item.inputs = [moved[place] for place in item.inputs]
        item.outputs = [moved[place] for place in item.outputs]
    for signature in model.signatureDefs:
        for end in (*signature.inputs, *signature.outputs):
            end.tensorIndex = moved[end.tensorIndex]


def _values(model: Any, place: int) -> tuple[int, ...] | None:
    """The integers of a constant; None if it is computed."""
    data = model.buffers[model.subgraphs[0].tensors[place].buffer].data
    return None if data is None else tuple(np.frombuffer(data, np.int32).tolist())
