"""`vitkit export`: a run into a verified artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vitkit.cli.arguments import JsonFlag, OptionPairs
from vitkit.cli.show import key_values, print_checks, print_json, say

if TYPE_CHECKING:
    from vitkit.runs import Run


def export(
    source: Annotated[str, typer.Argument(help="A run folder; or a model name, with --untrained.")],
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
        bool, typer.Option("--untrained", help="SOURCE is a model name: random weights.")
    ] = False,
    option: OptionPairs = None,
    json: JsonFlag = False,
) -> None:
    """Compile a run for a target, and verify that the engine does what the float model does.

    The artifact folder holds the engine as the target's own tools open it, card.json, golden.npz and, for
    int8, calibration.json. A broken engine is not written, and exits with 1. For tensorrt the graph is
    verified here, and vitkit build compiles it on the machine that is to run it.
    """
    from vitkit import exporters
    from vitkit.calibration.dataset import calibration_set
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.files import check_output_folder
    from vitkit.runtimes.image import sample_photos

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
    folder = out or _default_folder(source, target, precision)
    read = [Path(source)] if not untrained else []
    check_output_folder(folder, inputs=[*read, *(given for given in (calib, images, golden_from) if given)])
    calibration = calibration_set(calib, calib_count, calib_seed) if calib else None
    golden = [image for _, image in sample_photos(golden_from, 4)] if golden_from else None
    compared = sample_photos(images, 64) if images else []
    run = _load(source, untrained, option or [])
    artifact, checks = exporters.export(
        exporters.Source(run.model, run.card),
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


def _default_folder(source: str, target: str, precision: str) -> Path:
    """Beside the run; in the current folder for a model that is no run."""
    path = Path(source) if Path(source).name not in ("", "..") else Path(source).resolve()
    return path.with_name(f"{path.name}-{target}-{precision}")


def _load(source: str, untrained: bool, options: list[str]) -> Run:
    from vitkit.runs import load_run, untrained_run
    from vitkit.runtimes.errors import BadRequest

    values = key_values(options, "--option")
    folder = Path(source)
    if untrained:
        return untrained_run(source, values)
    if values:
        raise BadRequest("--option changes the architecture, which a run has fixed; it goes with --untrained")
    if not folder.exists():
        from vitkit.models import MODELS

        hint = (
            " add --untrained to export it with random weights" if source in MODELS else " name a run folder"
        )
        raise BadRequest(f"there is no run {source!r};{hint}")
    return load_run(folder)
