"""The `openvino` target: ONNX -> OpenVINO IR."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitkit.calibration.dataset import CalibrationSet
from vitkit.exporters.onnx import engine_card
from vitkit.exporters.source import Exportable
from vitkit.runtimes.card import Artifact, ImageSpec, ModelCard
from vitkit.runtimes.errors import ExportFailed

if TYPE_CHECKING:
    import openvino
    from onnx import ModelProto

ENGINE_FILE = "model.xml"
# The precisions an engine may compute in, best first; the runtime takes the first that the device has
# natively. Never left to OpenVINO, whose default on some CPUs is bf16.
PRECISION_HINTS = {"fp32": ["f32"], "fp16": ["f16", "f32"], "bf16": ["bf16"], "int8": ["bf16", "f32"]}


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
    """Write `model.xml` and `model.bin` into `folder` and return their card, without file hashes.

    `batch` None leaves the batch dimension free. Raises ExportFailed.
    """
    import openvino

    model, provenance = to_ir(source.graph(image, batch, opset)), {}
    if precision == "int8":
        from vitkit.calibration.openvino import attention_blocks, describe_scheme, quantize

        assert calibration is not None
        blocks = attention_blocks(model)
        provenance["int8_scheme"] = describe_scheme(blocks)
        model = quantize(model, calibration, image, source.float_modules, transformer=bool(blocks))
    _name_steadily(model)
    openvino.save_model(model, folder / ENGINE_FILE, compress_to_fp16=precision in ("fp16", "bf16"))
    card = engine_card(source, image, batch, target="openvino", precision=precision, engine=ENGINE_FILE)
    options = {"precision_hints": PRECISION_HINTS[precision]}
    return replace(card, options=options, provenance={**card.provenance, **provenance})


def to_ir(graph: ModelProto) -> openvino.Model:
    """An ONNX graph as an OpenVINO model, with its constants folded."""
    import openvino
    from openvino.passes import ConstantFolding, Manager

    model = openvino.Core().read_model(graph.SerializeToString())
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(model)
    _untie_transposed(model)
    return model


def _untie_transposed(model: openvino.Model) -> None:
    """Give products that read a square constant transposed a constant of their own, which they read as it is.

    OpenVINO 2026.4 orders a square constant on CPUs once for all products that read it, whether transposed
    or not, and thus computes `x @ W.T @ W` wrongly. Equal constants become one when a model is saved.
    """
    import openvino

    products: dict[tuple[object, ...], list[openvino.Node]] = defaultdict(list)
    for op in model.get_ordered_ops():
        weight = op.input_value(1).get_node() if op.get_type_name() == "MatMul" else None
        if weight is not None and weight.get_type_name() == "Constant" and weight.data.ndim > 1:
            products[weight.data.shape, weight.data.dtype.str, sha256(weight.data).digest()].append(op)
    for readers in products.values():
        transposed = [op for op in readers if op.get_attributes()["transpose_b"]]
        if len(transposed) == len(readers):
            continue
        for op in transposed:
            weight = op.input_value(1).get_node().data.swapaxes(-1, -2)
            own = openvino.opset13.constant(np.ascontiguousarray(weight))
            own.set_friendly_name(f"{op.get_friendly_name()}:in1")
            op.input(1).replace_source_output(own.output(0))
            op.set_attribute("transpose_b", False)


def write_twin(artifact: Artifact, folder: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Write the engine into `folder` with the integers that the named nodes compute as outputs too."""
    import openvino

    model = openvino.Core().read_model(artifact.engine_path)
    found = {op.get_friendly_name(): op for op in model.get_ops()}
    for name in shapes:
        if name not in found:
            raise ExportFailed(f"{artifact.path} has no node {name!r}, whose result is to be verified")
        # ArgMax has become TopK, whose second output are the places.
        place = 1 if found[name].get_type_name() == "TopK" else 0
        wide = openvino.opset13.convert(found[name].output(place), "i64")
        wide.output(0).get_tensor().set_names({name})
        model.add_results([openvino.opset13.result(wide)])
    openvino.save_model(model, folder / ENGINE_FILE, compress_to_fp16=False)


def _name_steadily(model: openvino.Model) -> None:
    """Number the nodes that OpenVINO named by a counter of the process, so that exports repeat."""
    for i, op in enumerate(model.get_ordered_ops()):
        if match := re.fullmatch(r"([A-Za-z]+)_\d+(/.*)?", op.get_friendly_name()):
            op.set_friendly_name(f"{match[1]}_{i}{match[2] or ''}")
