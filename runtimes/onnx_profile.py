"""What ONNX Runtime writes about a session: the profile of its runs, and the graph that it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitkit.runtimes.operators import Operator, Timing

_TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64"}
_QUANTISED = ("int8", "uint8")
_CONVERSIONS = ("Cast", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_INT8_KERNEL = re.compile(r"QLinear|Integer|^DynamicQuantize(?!Linear$)|^Q(Gemm|Attention)$")
_PRODUCT = re.compile(r"^(Fused|Nhwc)?(Conv|ConvTranspose|MatMul|Gemm)$")
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_KERNEL = "_kernel_time"
_FELL_BACK = "a float product of dequantised tensors: no INT8 kernel was found for it"


class Node(NamedTuple):
    """A node of an ONNX graph: its name, its operator, the names of the tensors it reads and makes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(model: bytes) -> list[Node]:
    """The nodes of the main graph of an ONNX file, in its order.

    ONNX Runtime does without the package `onnx`, and so do devices; the numbers are those of onnx.proto.
    """
    return [
        _node(node)
        for number, graph in _fields(memoryview(model))
        if number == 7
        for inner, node in _fields(graph)
        if inner == 1
    ]


def _node(message: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [""], 4: [""]}
    for number, value in _fields(message):
        if number in texts:
            texts[number].append(str(value, "utf-8", "replace"))
    return Node(texts[3][-1], texts[4][-1], tuple(texts[1]), tuple(texts[2]))


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message; texts and messages come as bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind, value = key & 7, None
        if kind == 0:
            _, place = _varint(message, place)
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size, place = _varint(message, place)
        value, place = message[place : place + size], place + size
        yield key >> 3, value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place


def float_products(nodes: Sequence[Node]) -> set[str]:
    """Names of the products in float whose two factors are dequantised only for them: meant to be INT8."""
    makers = {output: node for node in nodes for output in node.outputs}

    def is_dequantised(tensor: str) -> bool:
        maker = makers.get(tensor)
        while maker is not None and maker.kind in _LAYOUT:
            maker = makers.get(maker.inputs[0])
        return maker is not None and maker.kind == "DequantizeLinear"

    return {
        node.name
        for node in nodes
        if _PRODUCT.match(node.kind) and len(node.inputs) > 1 and all(map(is_dequantised, node.inputs[:2]))
    }


def read_timings(profile: Path, meant_int8: Iterable[str], skip: int = 0) -> list[Timing]:
    """The kernels of every run in a profile, without those of the first `skip` runs.

    `meant_int8` are names as `float_products` gives them.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    runs = sorted((event["ts"], event["dur"]) for event in events if event.get("name") == "model_run")[skip:]
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]
    kernels.sort(key=lambda event: (event["ts"], -event["dur"]))
    named, timings = set(meant_int8), []
    for number, (start, length) in enumerate(runs):
        inside = [event for event in kernels if start <= event["ts"] <= start + length]
        found = zip(inside, _own_times(inside), _operators(inside, named), strict=True)
        for event, took, operator in found:
            timings.append(Timing(operator, number, 1000 * (event["ts"] - start), 1000 * took))
    return timings


def _own_times(events: Sequence[dict[str, Any]]) -> list[int]:
    """Durations in order of the starts, without those of kernels inside: an If or Loop runs other kernels."""
    times = [event["dur"] for event in events]
    around: list[int] = []
    for i, event in enumerate(events):
        while around and events[around[-1]]["ts"] + events[around[-1]]["dur"] <= event["ts"]:
            around.pop()
        if around:
            times[around[-1]] -= event["dur"]
        around.append(i)
    return times


def _operators(events: Iterable[dict[str, Any]], meant_int8: set[str]) -> Iterator[Operator]:
    """The operators of one run in the order of execution."""
    quantised = False
    for event in events:
        about, name = event["args"], event["name"].removesuffix(_KERNEL)
        kind = about["op_name"]
        quantised = quantised or kind in ("QuantizeLinear", "DynamicQuantizeLinear")
        types = [
            [found for one in about.get(f"{side}_type_shape", []) for found in one]
            for side in ("input", "output")
        ]
        precision = _precision(kind, *types, quantised=quantised)
        reason = _FELL_BACK if name in meant_int8 and precision.startswith("fp") else ""
        yield Operator(name, kind, precision, about["provider"], reason)


def _precision(kind: str, inputs: Sequence[str], outputs: Sequence[str], *, quantised: bool) -> str:
    """What a kernel computes in, by the types of the tensors that it read and made.

    Before the first quantisation bytes are pixels; after it they are quantised numbers.
    """
    if kind in _CONVERSIONS:
        known = quantised or kind == "DequantizeLinear"
        before, after = (_name(types[:1], quantised=known) for types in (inputs, outputs))
        return before if before == after else f"{before} to {after}"
    if _INT8_KERNEL.search(kind):
        return "int8"
    return _name([*inputs, *outputs], quantised=quantised)


def _name(types: Sequence[str], *, quantised: bool) -> str:
    floats = [_TYPES[one] for one in types if one in _TYPES]
    if floats:
        return floats[0]
    return "int8" if quantised and any(one in _QUANTISED for one in types) else "integer"
