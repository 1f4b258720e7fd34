"""INT8 quantisation of an OpenVINO graph, by NNCF."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from vitkit.calibration.dataset import CalibrationSet
from vitkit.calibration.policy import check_float_modules, float_nodes
from vitkit.runtimes.card import ImageSpec

if TYPE_CHECKING:
    import openvino

METHOD = (
    "NNCF post-training quantisation: transformer scheme, performance preset, fast bias correction, "
    "weights in half of their range"
)


def quantize(
    model: openvino.Model, calibration: CalibrationSet, image: ImageSpec, float_modules: Sequence[str]
) -> openvino.Model:
    """Put FakeQuantize pairs where NNCF's transformer scheme wants them, except in the float modules.

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
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(inputs),
            # Not validated: the names include constants and shape operators, which NNCF does not list.
            ignored_scope=nncf.IgnoredScope(names=keep, validate=False),
            # CPUs without VNNI add two products of u8 and s8 in 16 bits, which saturate if weights use all 8.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.quantization.advanced_parameters.OverflowFix.ENABLE
            ),
        )
