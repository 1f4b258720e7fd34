"""Speed of every engine of one model, relative to ONNX Runtime on torch's plain float export = 1.00.

    python benchmarks/engines.py [--model ps_vit_ti_14_share] [--calib DIR] [--duration 10] [--threads 1 2]

Prints a table for each thread count. `plain-float` is benchmarks/plain.py, a PS-ViT written as one would;
`vitkit-model-plain-float` is vitkit's own module, whose form alone gains. Engines take camera frames and
normalise them; the plain exports take normalised floats, so the comparison is in their favour.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from plain import PlainPSViT

from vitkit import exporters
from vitkit.bench import BenchOptions, bench, to_markdown
from vitkit.calibration.dataset import calibration_set
from vitkit.exporters.onnx import engine_card
from vitkit.exporters.source import Source
from vitkit.models import build, run_card
from vitkit.runtimes.card import write_card
from vitkit.runtimes.image import generated_photos

ENGINES = [
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("tflite", "fp32"),
    ("tflite", "int8"),
]


def moving_model(name: str) -> Source:
    """The model with random weights whose offsets move the points, as training does."""
    torch.manual_seed(0)
    model = build(name)
    with torch.no_grad():
        for parameter in model.sampler.offset_layers.parameters():
            parameter.normal_(std=0.1)
    return Source(model.eval(), run_card(name, model.config))


def plain_export(module: torch.nn.Module, source: Source, folder: Path) -> Path:
    """What `torch.onnx.export` writes by default of a module, as an artifact."""
    folder.mkdir()
    side = source.card.image.size[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (torch.zeros(1, 3, side, side),),
            str(folder / "model.onnx"),
            input_names=["image"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    card = engine_card(source, source.card.image, 1, target="onnx", precision="fp32", engine="model.onnx")
    card = replace(
        card, outputs=card.outputs[:1], decode={"logits": "logits"}, files={"model.onnx": None}, provenance={}
    )
    write_card(card, folder)
    return folder


def calibration_folder(folder: Path) -> Path:
    folder.mkdir()
    for i, photo in enumerate(generated_photos(32, seed=1)):
        Image.fromarray(photo).save(folder / f"{i:02}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ps_vit_ti_14_share")
    parser.add_argument("--calib", type=Path, help="photographs to calibrate on (generated ones)")
    parser.add_argument("--duration", type=float, default=10.0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    source = moving_model(options.model)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        calibration = calibration_set(options.calib or calibration_folder(work / "photos"), 64)
        plain = PlainPSViT(source.module.config)
        paths = [
            plain_export(plain, source, work / "plain-float"),
            plain_export(source.module, source, work / "vitkit-model-plain-float"),
        ]
        for target, precision in ENGINES:
            given = calibration if precision == "int8" else None
            out = work / f"{target}-{precision}"
            exporters.export(source, out, target=target, precision=precision, calibration=given)
            paths.append(out)
        for threads in options.threads:
            print(f"\n## {options.model}, batch 1, {threads} threads\n")
            settings = BenchOptions(threads=threads, duration=options.duration, scopes=("engine",))
            reports = bench(paths, settings)
            print(to_markdown(reports))


if __name__ == "__main__":
    main()
