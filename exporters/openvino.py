"""The `openvino` target: ONNX -> OpenVINO IR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitkit.calibration.dataset import CalibrationSet
from vitkit.exporters.onnx import DEFAULT_OPSET, engine_card, trace
from vitkit.exporters.source import Source
from vitkit.runtimes.card import Artifact, ImageSpec, ModelCard
from vitkit.runtimes.errors import ExportFailed

if TYPE_CHECKING:
    import openvino

ENGINE_FILE = "model.xml"
# The precisions an engine may compute in, best first; the runtime takes the first that the device has
# natively. Never left to OpenVINO, whose default on some CPUs is bf16.
PRECISION_HINTS = {"fp32": ["f32"], "fp16": ["f16", "f32"], "bf16": ["bf16"], "int8": ["bf16", "f32"]}


def export(
    source: Source,
    folder: Path,
    *,
    precision: str,
    calibration: CalibrationSet | None = None,
    image: ImageSpec,
    batch: int | None = 1,
    opset: int = DEFAULT_OPSET,
) -> ModelCard:
    """Write `model.xml` and `model.bin` into `folder` and return their card, without file hashes.

    `batch` None leaves the batch dimension free. Raises ExportFailed.
    """
    import openvino

    graph = trace(source, image=image, batch=batch, opset=opset)
    model = openvino.Core().read_model(graph.SerializeToString())
    if precision == "int8":
        from vitkit.calibration.openvino import quantize

        assert calibration is not None
        model = quantize(model, calibration, image, source.module.float_modules)
    _name_steadily(model)
    openvino.save_model(model, folder / ENGINE_FILE, compress_to_fp16=precision in ("fp16", "bf16"))
    card = engine_card(source, image, batch, target="openvino", precision=precision, engine=ENGINE_FILE)
    return replace(card, options={"precision_hints": PRECISION_HINTS[precision]})


def write_twin(artifact: Artifact, folder: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Write the engine into `folder` with the whole numbers that the named nodes compute as outputs too."""
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
