"""INT8 quantisation of an OpenVINO graph, by NNCF."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from vitkit.calibration.dataset import CalibrationSet
from vitkit.calibration.policy import check_float_modules, float_nodes
from vitkit.runtimes.card import ImageSpec

if TYPE_CHECKING:
    import openvino

METHOD = "NNCF post-training: performance preset, fast bias correction, weights in half of their range"
_PRODUCTS = frozenset(("MatMul", "Einsum", "Convolution", "GroupConvolution"))
# What may lie between a product and the softmax of an attention block: layout, mask, bias, soft cap; and
# scales, which are constant, unlike gates.
_SCALES = frozenset(("Multiply", "Divide"))
_BETWEEN = frozenset(
    (
        *("Add", "Subtract", "Select", "Minimum", "Maximum", "Clamp", "Tanh", "Convert", "FakeQuantize"),
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split", "VariadicSplit", "Slice"),
        *("StridedSlice", "Gather", "Broadcast", "Pad"),
    )
)
# NNCF would quantise what norms compute their statistics with, for which there is no integer kernel on CPUs.
_NO_INTEGER_KERNEL = (
    *("MVN", "GroupNormalization", "NormalizeL2", "ReduceL2", "ReduceSum", "Power", "Divide", "Subtract"),
    *("SquaredDifference", "Sqrt", "Maximum", "Minimum"),
)
_FOLDABLE = frozenset(("Convert", "FakeQuantize", "Reshape", "Transpose", "Unsqueeze", "Broadcast"))


def attention_blocks(model: openvino.Model) -> list[str]:
    """Names of the softmaxes between two products of activations, one for each attention block.

    At most one product with weights may lie on either side, as in talking-heads attention (Shazeer et al.
    2020). A softmax may be written in exponentials; an operator that holds a whole block counts as one.
    """
    found = []
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        softmax = kind == "Softmax" or _is_softmax_in_exponentials(op)
        between = softmax and _meets_product(op, _makers) and _meets_product(op, _readers)
        if between or kind == "ScaledDotProductAttention":
            found.append(op.get_friendly_name())
    return found


def _is_softmax_in_exponentials(op: openvino.Node) -> bool:
    """Whether an operator divides exponentials by their own sum."""
    if op.get_type_name() != "Divide":
        return False
    above, below = _makers(op)
    kinds = (above.get_type_name(), below.get_type_name())
    return kinds == ("Exp", "ReduceSum") and bool(_makers(below)[0].get_name() == above.get_name())


def _meets_product(start: openvino.Node, step: Callable[[openvino.Node], list[openvino.Node]]) -> bool:
    """Whether steps from `start` meet a product of two activations, behind one with weights at most."""
    seen, waiting = set(), [(node, 1) for node in step(start)]
    while waiting:
        node, weighted = waiting.pop()
        kind, place = node.get_type_name(), (node.get_name(), weighted)
        if place in seen:
            continue
        seen.add(place)
        activations = sum(not _is_constant(maker) for maker in _makers(node))
        if kind in _PRODUCTS and activations > 1:
            return True
        if kind in _PRODUCTS and weighted:
            waiting += [(other, weighted - 1) for other in step(node)]
        elif kind in _BETWEEN or kind == "Exp" or (kind in _SCALES and activations == 1):
            waiting += [(other, weighted) for other in step(node)]
    return False


def _makers(node: openvino.Node) -> list[openvino.Node]:
    return [value.get_node() for value in node.input_values()]


def _readers(node: openvino.Node) -> list[openvino.Node]:
    return [reader.get_node() for output in node.outputs() for reader in output.get_target_inputs()]


def _is_constant(node: openvino.Node) -> bool:
    kind = node.get_type_name()
    return kind == "Constant" or (kind in _FOLDABLE and all(map(_is_constant, _makers(node))))


def describe_scheme(blocks: Sequence[str]) -> str:
    """NNCF's scheme for a network with these attention blocks, and the reason for it."""
    if not blocks:
        return "convolutional: no softmax lies between two products of activations"
    module = blocks[0].split("/")[0]
    return f"transformer: {len(blocks)} attention block{'s' * (len(blocks) > 1)}, the first in {module}"


def quantize(
    model: openvino.Model,
    calibration: CalibrationSet,
    image: ImageSpec,
    float_modules: Sequence[str],
    *,
    transformer: bool,
) -> openvino.Model:
    """Put FakeQuantize pairs where NNCF wants them, except in the float modules.

    Its scheme for transformers smooths activations (SmoothQuant, Xiao et al. 2023) and keeps sums, gates,
    norms and the result of attention's softmax float; the other one quantises sums and gates too.

    Raises ExportFailed if a pattern of `float_modules` matches no node.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    first = model.inputs[0].partial_shape[0]
    inputs = list(calibration.inputs(image, first.get_length() if first.is_static else 1))
    names = [op.get_friendly_name() for op in model.get_ops()]
    # Once more, since OpenVINO's reader has made nodes of its own from those of ONNX.
    check_float_modules(names, float_modules)
    keep = float_nodes(names, float_modules)
    # Standard output is for results: NNCF draws its progress bars there.
    with redirect_stdout(sys.stderr):
        return nncf.quantize(
            model,
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=len(inputs),
            # Not validated: the names include constants and shape operators, which NNCF does not list.
            ignored_scope=nncf.IgnoredScope(names=keep, types=list(_NO_INTEGER_KERNEL), validate=False),
            # CPUs without VNNI add two products of u8 and s8 in 16 bits, which saturate if weights use all 8.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.quantization.advanced_parameters.OverflowFix.ENABLE
            ),
        )
