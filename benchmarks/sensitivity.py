"""What INT8 does to a trained panoptic run, part by part: which parts must stay float?

    python benchmarks/sensitivity.py RUN DATA [--count 64] [--target onnx]

Each row quantises one part alone, or all but one, and compares the engine with the float model on the data
set's validation images: PQ of the engine's segments with the float model's as the truth, flipped k-means
assignments, the error of the mask logits. Calibrated on the training images.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from vitkit.calibration.dataset import calibration_set
from vitkit.exporters.parity_panoptic import PanopticParity, check_images
from vitkit.exporters.source import Source
from vitkit.exporters.targets import TARGETS, with_defaults
from vitkit.exporters.verify import check_decisions
from vitkit.runs import load_run
from vitkit.runtimes.card import write_card
from vitkit.runtimes.engine import open_engine
from vitkit.runtimes.image import sample_photos

PARTS = {
    "backbone": ("backbone.*",),
    "pixel stage 1/32": ("pixel_decoder.stages.0*",),
    "pixel stage 1/16": ("pixel_decoder.stages.1*",),
    "pixel stage 1/8": ("pixel_decoder.stages.2*",),
    "pixel stage 1/4": ("pixel_decoder.stages.3*",),
    "fusions": ("pixel_decoder.fuses*",),
    "block pixels": ("decoder.blocks.*.pixel_in*", "decoder.blocks.*.predictor.pixel*"),
    "block queries": (
        "decoder.blocks.*.query*", "decoder.blocks.*.attention*", "decoder.blocks.*.ffn*",
        "decoder.blocks.*.update*", "decoder.blocks.*.predictor.mask_kernel*",
    ),
    "final head": ("decoder.predictor*", "decoder.class*", "decoder.mask*"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--target", default="onnx")
    given = parser.parse_args()
    run = load_run(given.run)
    plain = Source(run.model, run.card)
    calibration = calibration_set(given.data / "train", 128)
    images = sample_photos(given.data / "val", given.count)
    image = replace(run.card.image, layout="NHWC", dtype="uint8")
    module = TARGETS.module(given.target, "module")

    def row(text: str, also_float: tuple[str, ...]) -> None:
        # The traced module must be a torch module: only the policy differs.
        source = Source(run.model, run.card)
        original = type(run.model).float_modules
        type(run.model).float_modules = property(lambda self: (*declared, *also_float))  # type: ignore[assignment]
        try:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                card = module.export(
                    source,
                    folder,
                    precision="int8",
                    calibration=calibration,
                    image=image,
                    batch=1,
                    **with_defaults(given.target, None),
                )
                write_card(replace(card, files={p.name: None for p in folder.iterdir()}), folder)
                with open_engine(folder) as engine:
                    decisions = check_decisions(engine, source, images)
                    found = check_images(engine, plain, images, decisions)
        finally:
            type(run.model).float_modules = original  # type: ignore[method-assign]
        assert isinstance(found, PanopticParity)
        flips = ", ".join(f"{share:.2%}" for share in found.decisions.values())
        print(f"| {text} | {found.quality or 0:.2f} | {flips} | {found.error:.3f} |", flush=True)

    declared = run.model.float_modules
    print("| quantised | PQ against float | flipped assignments | mask logits error |\n|---|---|---|---|")
    row("everything but the policy", ())
    for name in PARTS:
        others = tuple(pattern for part, patterns in PARTS.items() if part != name for pattern in patterns)
        row(f"{name} alone", others)
    for name, patterns in PARTS.items():
        row(f"all but {name}", patterns)


if __name__ == "__main__":
    main()
