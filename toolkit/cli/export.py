"""`vitkit export`: a run or a network from outside into a verified artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vitkit.cli import card_flags as card
from vitkit.cli.arguments import JsonFlag, OptionPairs
from vitkit.cli.show import key_values, print_checks, print_json, say

if TYPE_CHECKING:
    from vitkit.sources.resolve import SourceWord


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="A run folder, timm:NAME, timm:NAME=FILE, hf:FOLDER, FILE.pt2, FILE.py:FACTORY (runs its "
            "code), PACKAGE.MODULE:FACTORY; or a model name, with --untrained."
        ),
    ],
    target: Annotated[str, typer.Option("--target", help="onnx, openvino, tflite or tensorrt.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Artifact folder to write (SOURCE-TARGET-PRECISION)."),
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16, bf16 or int8.")] = "fp32",
    calib: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--calib", help="Folder of images that calibrate int8; searched recursively."),
    ] = None,
    calib_count: Annotated[int, typer.Option(help="Images to calibrate on.")] = 128,
    calib_seed: Annotated[int, typer.Option(help="Seed of their choice.")] = 0,
    input: Annotated[
        str,
        typer.Option("--input", help="uint8: camera frames NHWC RGB, normalised inside. float32: NCHW."),
    ] = "uint8",
    batch: Annotated[int, typer.Option(help="Images of one run of the engine.")] = 1,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Any number of images a run.")
    ] = False,
    opset: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="ONNX opset of targets onnx and openvino, 18 to 25 (20)."),
    ] = None,
    trt_version: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="TensorRT that will build the engine of target tensorrt: 8.5, 8.6, 10 or 11 (10)."),
    ] = None,
    golden_from: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--golden-from", help="Take golden.npz's images from this folder; they will travel."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Images to compare engine and model on (int8: those of --calib)."),
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Random weights, of a model name or timm:NAME.")
    ] = False,
    option: OptionPairs = None,
    card_file: card.CardFile = None,
    task: card.Task = None,
    size: card.Size = None,
    mean: card.Mean = None,
    std: card.Std = None,
    colour: card.Colour = None,
    fit: card.Fit = None,
    crop_pct: card.CropPct = None,
    interpolation: card.Interpolation = None,
    labels: card.LabelsFile = None,
    outputs: card.Outputs = None,
    keep_float: card.KeepFloat = None,
    json: JsonFlag = False,
) -> None:
    """Compile a network for a target, and verify that the engine does what the float model does.

    What a card needs and a network from outside does not say comes from flags or --card; what is assumed is
    printed, and kept in the artifact's card.

    The artifact folder holds the engine as the target's own tools open it, card.json, golden.npz and, for
    int8, calibration.json. A broken engine is not written, and exits with 1. For tensorrt the graph is
    verified here, and vitkit build compiles it on the machine that is to run it.
    """
    from vitkit import exporters
    from vitkit.calibration.dataset import calibration_set
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.files import check_output_folder
    from vitkit.runtimes.image import sample_photos
    from vitkit.sources import check_word, parse_word, resolve

    if dynamic_batch and batch != 1:
        raise BadRequest("--batch and --dynamic-batch exclude each other")
    request: dict[str, Any] = {
        "target": target,
        "precision": precision,
        "input": input,
        "batch": None if dynamic_batch else batch,
        "options": {
            name: value
            for name, value in (("opset", opset), ("trt_version", trt_version))
            if value is not None
        },
    }
    exporters.check_request(**request, calibrated=calib is not None)
    values = card.card_values(
        card_file,
        labels,
        task=task,
        size=size,
        mean=mean,
        std=std,
        colour=colour,
        fit=fit,
        crop_pct=crop_pct,
        interpolation=interpolation,
        outputs=outputs,
    )
    word = parse_word(source)
    check_word(word, values)
    folder = out or _default_folder(source, word, target, precision)
    read = [word.path] if word.path and not untrained else []
    check_output_folder(folder, inputs=[*read, *(given for given in (calib, images, golden_from) if given)])
    calibration = calibration_set(calib, calib_count, calib_seed) if calib else None
    golden = [image for _, image in sample_photos(golden_from, 4)] if golden_from else None
    compared = sample_photos(images, 64) if images else []
    network = resolve(
        source,
        values,
        keep_float=keep_float or (),
        untrained=untrained,
        options=key_values(option or [], "--option"),
    )
    if word.kind != "run":
        card.say_card(network.card)
    artifact, checks = exporters.export(
        network,
        folder,
        **request,
        calibration=calibration,
        golden=golden,
        images=compared,
        step=lambda text: say(f"{text} ..."),
    )
    if json:
        body = {
            "artifact": str(folder),
            "bytes": artifact.size_bytes,
            "checks": [check.summary() for check in checks],
        }
        print_json(body)
        return
    print_checks(checks)
    say(f"{folder}: {artifact.card.name}, {target} {precision}, {artifact.size_bytes / 1e6:.1f} MB")
    if exporters.TARGETS[target].stand_in:
        say(f"its engine is not built yet; on the machine that is to run it: vitkit build {folder}")


def _default_folder(source: str, word: SourceWord, target: str, precision: str) -> Path:
    """Beside the run; in the current folder for anything else."""
    place = Path(source).resolve() if Path(source).name in ("", "..") else Path(source)
    beside = place if word.kind == "run" else Path(word.name)
    return beside.with_name(f"{beside.name}-{target}-{precision}")
