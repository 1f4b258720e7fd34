"""Static Q/DQ quantisation of an ONNX graph, by ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.calibration.dataset import CalibrationSet
from vitkit.calibration.policy import float_nodes
from vitkit.calibration.quiet import without_advice
from vitkit.runtimes.card import ImageSpec

if TYPE_CHECKING:
    from onnx import ModelProto

METHOD = "onnxruntime static Q/DQ: min-max, u8 activations, 7-bit weights per channel; Conv, MatMul, Gemm"


def quantize(
    model: ModelProto, calibration: CalibrationSet, image: ImageSpec, float_modules: Sequence[str]
) -> ModelProto:
    """Put Q/DQ pairs around convolutions and weight products, except in the float modules.

    Products of two activations (attention) stay float: quantising them costs accuracy and saves little. So
    do stacks of matrices, for which ONNX Runtime has no INT8 kernel with a scale for each channel.

    A node of a float module that shares a quantised tensor reads the quantised values: docs/results/remax.md
    has what giving it the float ones costs and brings. `model` must not be used afterwards.
    """
    matrices = {item.name for item in model.graph.initializer if len(item.dims) == 2}
    names = [node.name for node in model.graph.node]
    products = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.input[1] not in matrices]
    return static_qdq(
        model,
        calibration,
        image,
        exclude=[*float_nodes(names, float_modules), *products],
        activations="QUInt8",
        # CPUs without VNNI add two products of u8 and s8 in 16 bits, which saturate if weights use all 8.
        reduce_range=True,
        # What follows a product is float here (norms, GELU, residuals): a Q/DQ pair would only cost.
        options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )


def static_qdq(
    model: ModelProto,
    calibration: CalibrationSet,
    image: ImageSpec,
    *,
    exclude: Sequence[str],
    activations: str,
    reduce_range: bool,
    options: Mapping[str, Any],
) -> ModelProto:
    """Q/DQ pairs around Conv, MatMul and Gemm nodes, except those named in `exclude`.

    Ranges are the least and greatest values seen, weights signed with a scale for each channel.
    `activations` is ONNX Runtime's name of their type, `options` are its extra options; with `reduce_range`
    weights use 7 bits. `model` must not be used afterwards: ONNX Runtime moves its weights into a file that
    is gone by then.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.inputs: Iterator[Any] = calibration.inputs(image, batch)

        def get_next(self) -> dict[str, Any] | None:
            item = next(self.inputs, None)
            return None if item is None else {model.graph.input[0].name: item}

    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        # The advice is on a preprocessing step that the exporter has already done.
        with without_advice():
            quantize_static(
                model,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                per_channel=True,
                activation_type=QuantType[activations],
                weight_type=QuantType.QInt8,
                reduce_range=reduce_range,
                nodes_to_exclude=list(exclude),
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=dict(options),
            )
        quantised: ModelProto = onnx.load(path)
    return quantised
