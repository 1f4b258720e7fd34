"""Selective INT8 and half-precision weights of a TFLite file, by AI Edge Quantizer."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vitkit.calibration.dataset import CalibrationSet
from vitkit.calibration.policy import float_nodes
from vitkit.calibration.quiet import without_advice
from vitkit.runtimes.card import ImageSpec

METHOD = (
    "AI Edge Quantizer static: minimum and maximum over all images, s8 activations, s8 weights per "
    "channel; convolutions, sums and maxima of their maps, fully connected layers"
)
# In the format's words. The rest (norms, softmax, products of two activations, look-ups and their indices)
# costs accuracy in INT8 and gains nothing.
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
JOINTS = ("ADD", "PAD", "MAX_POOL_2D")
_SIGNATURE = "serving_default"


def quantize(
    content: bytes,
    products: Mapping[str, Sequence[str]],
    calibration: CalibrationSet,
    image: ImageSpec,
    float_modules: Sequence[str],
    batch: int = 1,
) -> bytes:
    """Quantise products with weights of a float file, and what joins them, except in the float modules.

    `products` are the names of their results by kind, of `WEIGHTED` and `JOINTS`; `batch` is the file's own.
    """
    quantizer = _quantizer(content)
    for kind, names in _wanted(products, float_modules):
        quantizer.add_static_config(_exactly(names), kind, activation_num_bits=8, weight_num_bits=8)
    # A list: the vendor goes over it twice.
    feeds = [{"image": inputs} for inputs in calibration.inputs(image, batch)]
    return _result(quantizer, _ranges(content, quantizer, feeds))


def _ranges(content: bytes, quantizer: Any, feeds: list[dict[str, Any]]) -> Any:
    """Minimum and maximum of every tensor that the quantiser's recipe names, over all feeds.

    The quantiser's own calibration takes moving averages, which clip what few images have: a trained PS-ViT
    nano then has ten times the error.
    """
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.recipe_manager import RecipeManager
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    recipe = RecipeManager()
    recipe.load_quantization_recipe(quantizer.get_quantization_recipe())
    with _quiet():
        calibrator = Calibrator(content, num_threads=os.cpu_count() or 1, qsv_update_func=min_max_update)
        calibrator.calibrate({_SIGNATURE: feeds}, recipe)
        return calibrator.get_model_qsvs()


def halve(content: bytes, products: Mapping[str, Sequence[str]], float_modules: Sequence[str]) -> bytes:
    """Store the weights of products in half precision, except in the float modules."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.quantizer import AlgorithmName

    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=weights,
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    quantizer = _quantizer(content)
    for kind, names in _wanted({kind: products[kind] for kind in WEIGHTED}, float_modules):
        quantizer.update_quantization_recipe(_exactly(names), kind, config, AlgorithmName.FLOAT_CASTING)
    return _result(quantizer, None)


def _quantizer(content: bytes) -> Any:
    from ai_edge_quantizer.quantizer import Quantizer

    return Quantizer(bytearray(content))


def _wanted(
    products: Mapping[str, Sequence[str]], float_modules: Sequence[str]
) -> Iterator[tuple[Any, list[str]]]:
    """The kinds in the vendor's words with what of them is not kept float; none that the graph lacks."""
    from ai_edge_quantizer import qtyping

    for kind, names in products.items():
        keep = set(float_nodes(names, float_modules))
        if chosen := [name for name in names if name not in keep]:
            yield qtyping.TFLOperationName[kind], chosen


def _exactly(names: Sequence[str]) -> str:
    """A pattern for the operators whose results have these names; the vendor ends each with a semicolon."""
    return f"^({'|'.join(re.escape(name) for name in names)});$"


def _result(quantizer: Any, ranges: Any) -> bytes:
    with _quiet():
        result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the vendor's account of a file that the exporter checks anyway."""
    with (
        without_advice(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield
