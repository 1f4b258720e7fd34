"""Making engines of the target `zipped`: a compressed ONNX graph."""

import zlib
from pathlib import Path

from vitkit.calibration.dataset import CalibrationSet
from vitkit.exporters.onnx import engine_card
from vitkit.exporters.source import Exportable
from vitkit.exporters.targets import OPSET, Target
from vitkit.runtimes import ImageSpec, ModelCard

TARGET = Target(
    "zipped_exporter",
    quantiser="",
    packages=("torch", "onnx", "onnxscript", "onnxruntime"),
    precisions=("fp32",),
    refusals={"int8": "zipped engines are float; use --target onnx"},
    options=(OPSET,),
)


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
    """Write `model.zip` into `folder` and return its card."""
    graph = source.graph(image, batch, opset)
    (folder / "model.zip").write_bytes(zlib.compress(graph.SerializeToString()))
    return engine_card(source, image, batch, target="zipped", precision=precision, engine="model.zip")
