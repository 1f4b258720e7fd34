"""The `onnx` target, and what other targets make of an ONNX graph share with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitkit.calibration.dataset import CalibrationSet
from vitkit.exporters.half import to_half
from vitkit.exporters.source import Exportable
from vitkit.runtimes.card import Artifact, ImageSpec, ModelCard, TensorSpec
from vitkit.runtimes.errors import ExportFailed

if TYPE_CHECKING:
    from onnx import ModelProto

ENGINE_FILE = "model.onnx"


def export(
    source: Exportable,
    folder: Path,
    *,
    precision: str,
    calibration: CalibrationSet | None = None,
    image: ImageSpec,
    batch: int | None,
    opset: int,
) -> ModelCard:
    """Write `model.onnx` into `folder` and return its card, without file hashes.

    `batch` None leaves the batch dimension free. Raises ExportFailed.
    """
    import onnx

    model = source.graph(image, batch, opset)
    if precision == "fp16":
        model = to_half(model, source.float_modules)
    path = folder / ENGINE_FILE
    if precision == "int8":
        from vitkit.calibration.onnx import quantize

        assert calibration is not None
        model = quantize(model, calibration, image, source.float_modules)
    check_graph(model, opset)
    onnx.save(model, path)
    return engine_card(source, image, batch, target="onnx", precision=precision, engine=ENGINE_FILE)


def write_twin(artifact: Artifact, folder: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Write the engine into `folder` with the integers that the named nodes compute as outputs too."""
    import onnx

    model = onnx.load(artifact.engine_path)
    values = {node.name: node.output[0] for node in model.graph.node}
    for name, shape in shapes.items():
        if values.get(name) != name:
            raise ExportFailed(f"{artifact.path} has no node {name!r}, whose result is to be verified")
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape))
    onnx.save(model, folder / ENGINE_FILE)


def engine_card(
    source: Exportable, image: ImageSpec, batch: int | None, *, target: str, precision: str, engine: str
) -> ModelCard:
    """The run's card turned into that of an engine with the given input."""
    height, width = image.size
    shape = (batch, height, width, 3) if image.layout == "NHWC" else (batch, 3, height, width)
    outputs = tuple(replace(spec, shape=(batch, *spec.shape[1:])) for spec in source.card.outputs)
    return replace(
        source.card,
        target=target,
        precision=precision,
        inputs=(TensorSpec("image", shape, image.dtype),),
        outputs=outputs,
        image=image,
        engine=engine,
    )


def check_graph(model: ModelProto, opset: int) -> None:
    """Refuse a graph of another opset, or one that ONNX's checker does not pass; raises ExportFailed."""
    import onnx

    versions = {item.domain: item.version for item in model.opset_import}
    if versions.get("") != opset:
        raise ExportFailed(f"asked for opset {opset}, the graph declares {versions.get('')}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportFailed(f"the graph of {model.graph.name} does not pass ONNX's checker: {error}") from None
