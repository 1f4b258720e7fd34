"""The `tflite` target: torch -> LiteRT's own converter -> a file whose operators are named by module."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.calibration.dataset import CalibrationSet
from vitkit.calibration.policy import check_float_modules
from vitkit.exporters.half import CAMERA_MODULE
from vitkit.exporters.onnx import engine_card
from vitkit.exporters.source import Source
from vitkit.exporters.tflite_graph import (
    append_operator,
    is_constant,
    kind_of,
    read_model,
    shorten,
    write_model,
)
from vitkit.exporters.trace import camera_module
from vitkit.runtimes.card import Artifact, ImageSpec, ModelCard
from vitkit.runtimes.errors import ExportFailed

if TYPE_CHECKING:
    from torch import nn

ENGINE_FILE = "model.tflite"
# The converter names an operator after all that was fused into it. A convolution stands last there, behind
# its norm and activation; of others the operator itself stands first.
_CONVOLUTIONS = ("Conv2d", "DepthwiseConv2d")


def export(
    source: Source,
    folder: Path,
    *,
    precision: str,
    calibration: CalibrationSet | None = None,
    image: ImageSpec,
    batch: int | None,
) -> ModelCard:
    """Write `model.tflite` into `folder` and return its card, without file hashes.

    `batch` is a number. fp16 stores weights in half precision, which XNNPACK
    computes with in float32 on CPUs without float16 arithmetic. Raises ExportFailed, also if a pattern of the
    model's `float_modules` matches no operator.
    """
    assert batch is not None
    content, keep = convert(source, image, batch), source.float_modules
    graph = read_model(content).subgraphs[0]
    check_float_modules([graph.tensors[step.outputs[0]].name.decode() for step in graph.operators], keep)
    if precision != "fp32":
        from vitkit.calibration.tflite import halve, quantize

        products = products_of(read_model(content))
        if precision == "fp16":
            content = halve(content, products, keep)
        else:
            assert calibration is not None
            content = quantize(content, products, calibration, image, keep, batch)
        model = read_model(content)
        _name_ends(model)
        # Written once more, since the quantiser does not align constants.
        content = write_model(model)
    (folder / ENGINE_FILE).write_bytes(content)
    card = engine_card(source, image, batch, target="tflite", precision=precision, engine=ENGINE_FILE)
    # The converter gives every 64-bit output 32 bits.
    outputs = (replace(spec, dtype="int32" if spec.dtype == "int64" else spec.dtype) for spec in card.outputs)
    return replace(card, outputs=tuple(outputs))


def write_twin(artifact: Artifact, folder: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Write the engine into `folder` with the integers of the named operators as outputs too."""
    from ai_edge_litert import schema_py_generated as schema

    model = read_model(artifact.engine_path.read_bytes())
    graph = model.subgraphs[0]
    places = {tensor.name.decode(): i for i, tensor in enumerate(graph.tensors)}
    for name, shape in shapes.items():
        if name not in places:
            raise ExportFailed(f"{artifact.path} has no operator {name!r}, whose result is to be verified")
        found = graph.tensors[places[name]]
        found.name = f"{name}:narrow".encode()
        cast, reshape = schema.CastOptionsT(), schema.ReshapeOptionsT()
        cast.inDataType, cast.outDataType = found.type, schema.TensorType.INT64
        reshape.newShape = list(shape)
        wide = append_operator(model, "CAST", [places[name]], found.shape, places[name], cast, f"{name}:wide")
        graph.tensors[wide].type = schema.TensorType.INT64
        output = append_operator(model, "RESHAPE", [wide], reshape.newShape, wide, reshape, name)
        graph.outputs = [*graph.outputs, output]
    # A signature lists the outputs once more; without any, the graph's own count.
    model.signatureDefs = None
    (folder / ENGINE_FILE).write_bytes(write_model(model))


def convert(source: Source, image: ImageSpec, batch: int) -> bytes:
    """The source as a float32 file that takes (batch, ...) `image`-shaped inputs.

    Every operator's result is named `<module path>/<operator>`, which is what float policies match.
    Raises ExportFailed if the converter did not write what it was asked for.
    """
    import litert_torch
    import torch

    height, width = image.size
    shape = (height, width, 3) if image.layout == "NHWC" else (3, height, width)
    example = torch.zeros((batch, *shape), dtype=getattr(torch, image.dtype))
    module = camera_module(source.module, image)
    with _classes_tell_paths(module) as paths, _quiet():
        converted = litert_torch.convert(module, (example,))
        model = read_model(converted.model_content())
    shorten(model)
    _name_by_module(model, paths)
    _name_signature(model, source.output_names)
    _name_ends(model)
    return write_model(model)


@contextmanager
def _classes_tell_paths(module: nn.Module) -> Iterator[dict[str, str]]:
    """Let each module's class be called after its path, since the converter writes classes into names.

    Its own names hold a module's class and the last part of its path, which does not tell `a.0` from `b.0`.
    Yields what it will write for a module -> the module's path.
    """
    classes = {child: type(child) for _, child in module.named_modules()}
    written = {}
    try:
        for path, child in module.named_modules():
            shown = path.removeprefix("model").removeprefix(".") or CAMERA_MODULE
            child.__class__ = type(shown, (classes[child],), {"__module__": "module"})
            written["_".join(["module." + shown, *path.split(".")[-1:]]) if path else f"module.{shown}"] = (
                shown
            )
        yield written
    finally:
        for child, kind in classes.items():
            child.__class__ = kind


def _name_by_module(model: Any, paths: Mapping[str, str]) -> None:
    """Name results `<module path>/<operator>`, numbered where that repeats, and constants by their user."""
    graph = model.subgraphs[0]
    seen: Counter[str] = Counter()
    modules: dict[int, str] = {}
    names = {i: tensor.name.decode() for i, tensor in enumerate(graph.tensors)}
    for step in graph.operators:
        # In the words of the other engines: `ArgMax` for ARG_MAX.
        kind = "".join(word.capitalize() for word in kind_of(model, step).split("_"))
        module = _module_path(step, kind, names, paths) or next(
            (modules[i] for i in step.inputs if i in modules), CAMERA_MODULE
        )
        stem = f"{module}/{kind}"
        seen[stem] += 1
        name = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
        for position, i in enumerate(step.inputs):
            if i >= 0 and i not in modules and i not in graph.inputs:
                modules[i] = module
                graph.tensors[i].name = f"{name}:in{position}".encode()
        for position, i in enumerate(step.outputs):
            modules[i] = module
            graph.tensors[i].name = (f"{name}:{position}" if position else name).encode()


def _module_path(step: Any, kind: str, names: Mapping[int, str], paths: Mapping[str, str]) -> str | None:
    """The module path of an operator; that of its constants where its result has an output's name."""
    for i in (step.outputs[0], *step.inputs[1:]):
        found = [paths.get(part.split("/")[-1]) for part in names.get(i, "").split(";")]
        known = [module for module in found if module is not None]
        if known:
            return known[-1] if kind in _CONVOLUTIONS else known[0]
    return None


def products_of(model: Any) -> dict[str, list[str]]:
    """Names of the results that INT8 is for, by kind: products with constant weights, and what joins them.

    These are sums, paddings and maxima of maps that a convolution made: between quantised products, their
    float forms would cost more than they compute.
    """
    from vitkit.calibration.tflite import JOINTS, WEIGHTED

    graph = model.subgraphs[0]
    found: dict[str, list[str]] = {kind: [] for kind in (*WEIGHTED, *JOINTS)}
    maps: set[int] = set()
    for step in graph.operators:
        kind, result = kind_of(model, step), step.outputs[0]
        weighted = kind in WEIGHTED and is_constant(model, step.inputs[1])
        if weighted or (kind in JOINTS and maps & set(step.inputs)):
            found[kind].append(graph.tensors[result].name.decode())
            if len(graph.tensors[result].shape) == 4 and kind != "ADD":
                maps.add(result)
    return found


def _name_signature(model: Any, outputs: tuple[str, ...]) -> None:
    """Put the card's names into the signature, in place of the converter's numbers."""
    graph, (signature,) = model.subgraphs[0], model.signatureDefs
    if len(graph.outputs) != len(outputs) or len(graph.inputs) != 1:
        raise ExportFailed(
            f"the converter wrote {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; wanted are 1 "
            f"and {', '.join(outputs)}"
        )
    signature.inputs[0].name = b"image"
    for item in signature.outputs:
        item.name = outputs[int(item.name.decode().removeprefix("output_"))].encode()


def _name_ends(model: Any) -> None:
    """Give the graph's input and outputs the names that its signature has for them."""
    graph, (signature,) = model.subgraphs[0], model.signatureDefs
    ends = {item.tensorIndex: item.name for item in (*signature.inputs, *signature.outputs)}
    for i, tensor in enumerate(graph.tensors):
        # Where a quantised result is an output, the quantiser puts another tensor behind it.
        tensor.name = ends.get(i, tensor.name + b":steps" if tensor.name in ends.values() else tensor.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the vendor's progress, which it writes to standard output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
