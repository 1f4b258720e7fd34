"""Commands that make things: models, import, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vitkit.cli import app
from vitkit.cli.show import key_values, print_json, print_table, say

if TYPE_CHECKING:
    from vitkit.exporters.parity import Check
    from vitkit.runs import Run

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
OptionPairs = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--option", help="Change an architecture option, as key=value; may repeat."),
]
_ACCURACY = {"top-1": "top1", "PQ": "pq"}


@app.command()
def models(json: JsonFlag = False) -> None:
    """List the registered models: task, input, parameters, multiply-adds, the paper's accuracy.

    Parameters are the trainable ones of the network that is deployed; MACs are those of convolutions,
    linear layers and matrix products, for one image. Top-1 is on ImageNet, PQ on COCO.
    """
    import torch

    from vitkit.models import MODELS, build, count_macs, count_parameters

    rows: list[dict[str, Any]] = []
    for name, info in MODELS.items():
        with torch.device("meta"):
            model = build(name)
        side = info.config.image_size
        rows.append(
            {
                "name": name,
                "task": info.task,
                "input": [3, side, side],
                "params": count_parameters(model),
                "macs": count_macs(model),
                "top1": info.reported if info.task == "classification" else None,
                "pq": info.reported if info.task == "panoptic" else None,
                "source": info.source,
            }
        )
    if json:
        print_json(rows)
        return
    table = [
        (
            row["name"],
            row["task"],
            "x".join(map(str, row["input"][1:])),
            f"{row['params']:,}",
            f"{row['macs'] / 1e9:.3f} G",
            next((f"{name} {row[key]:.1f}" for name, key in _ACCURACY.items() if row[key]), "-"),
        )
        for row in rows
    ]
    print_table(("model", "task", "input", "parameters", "MACs", "published, %"), table)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="The checkpoint: .pth or .safetensors.")],
    format: Annotated[str, typer.Option("--format", help="Layout of the checkpoint: psvit.")],
    model: Annotated[
        str, typer.Option("--model", help="Model that the weights belong to (see: vitkit models).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")],
    option: OptionPairs = None,
) -> None:
    """Turn somebody's checkpoint into a run, without running any code in it.

    For the authors' released PS-ViT weights add --option qk_scale=dim.
    """
    from dataclasses import asdict, replace

    from vitkit.models import model_info, run_card
    from vitkit.models.checkpoints import load_checkpoint
    from vitkit.runs import save_run
    from vitkit.runtimes.card import sha256
    from vitkit.runtimes.files import check_output_folder

    check_output_folder(out, inputs=[file])
    model_info(model)
    network = load_checkpoint(file, format, model, key_values(option or [], "--option"))
    card = run_card(model, network.config, *_imagenet_labels(network.config.num_classes))
    weights = {"imported": file.name, "format": format, "sha256": sha256(file)}
    card = replace(card, provenance={**card.provenance, "weights": weights})
    config = {"model": model, "options": asdict(network.config)}
    save_run(out, network, card, config)
    say(f"{out}: {model} with the weights of {file.name}")


def _imagenet_labels(classes: int) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Names and folder names of ImageNet's classes for a model that has 1000; none for any other."""
    if classes != 1000:
        return (), None
    from vitkit.torchvision_shim import timm

    info = timm.data.ImageNetInfo()
    descriptions = tuple(info.index_to_description(i) for i in range(1000))
    return descriptions, tuple(info.index_to_label_name(i) for i in range(1000))


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A run folder; or a model name, with --untrained.")],
    target: Annotated[str, typer.Option("--target", help="onnx or openvino.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Artifact folder to write.")],
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16, bf16 or int8.")] = "fp32",
    calib: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--calib", help="Folder of photographs that calibrate int8; searched recursively."),
    ] = None,
    calib_count: Annotated[int, typer.Option(help="Photographs to calibrate on.")] = 128,
    calib_seed: Annotated[int, typer.Option(help="Seed of their choice.")] = 0,
    input: Annotated[
        str,
        typer.Option("--input", help="uint8: camera frames NHWC RGB, normalised inside. float32: NCHW."),
    ] = "uint8",
    batch: Annotated[int, typer.Option(help="Images of one run of the engine.")] = 1,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Any number of images a run.")
    ] = False,
    opset: Annotated[Optional[int], typer.Option(help="ONNX opset, 18 to 25 (20).")] = None,  # noqa: UP045
    golden_from: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--golden-from", help="Take golden.npz's images from this folder; they will travel."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Photographs to compare engine and model on (int8: those of --calib)."),
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="SOURCE is a model name: random weights.")
    ] = False,
    option: OptionPairs = None,
    json: JsonFlag = False,
) -> None:
    """Compile a run for a target, and verify that the engine does what the float model does.

    The artifact folder holds the engine as the target's own tools open it, card.json, golden.npz and, for
    int8, calibration.json. A broken engine is not written, and exits with 1.
    """
    from vitkit import exporters
    from vitkit.calibration.dataset import calibration_set
    from vitkit.exporters.source import Source
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.files import check_output_folder
    from vitkit.runtimes.image import sample_photos

    if dynamic_batch and batch != 1:
        raise BadRequest("--batch and --dynamic-batch exclude each other")
    size = None if dynamic_batch else batch
    exporters.check_request(target, precision, input=input, batch=size, opset=opset)
    exporters.check_calibration(precision, calib is not None)
    read = [Path(source)] if not untrained else []
    check_output_folder(out, inputs=[*read, *(given for given in (calib, images, golden_from) if given)])
    calibration = calibration_set(calib, calib_count, calib_seed) if calib else None
    golden = sample_photos(golden_from, 4) if golden_from else None
    photos = sample_photos(images, 64) if images else []
    if not images and calibration:
        photos = list(zip(calibration.files[:64], calibration.photos(), strict=False))
    run = _source(source, untrained, option or [])
    artifact, checks = exporters.export(
        Source(run.model, run.card),
        out,
        target=target,
        precision=precision,
        calibration=calibration,
        input=input,
        batch=size,
        opset=opset,
        golden=[photo for _, photo in golden] if golden else None,
        photos=photos,
        step=lambda text: say(f"{text} ..."),
    )
    if json:
        body = {"artifact": str(out), "bytes": artifact.size_bytes, "checks": [c.summary() for c in checks]}
        print_json(body)
        return
    print_checks(checks)
    say(f"{out}: {artifact.card.name}, {target} {precision}, {artifact.size_bytes / 1e6:.1f} MB")


def _source(source: str, untrained: bool, options: list[str]) -> Run:
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


def print_checks(checks: list[Check]) -> None:
    """Each parity check on a line, and the images that stand out."""
    for check in checks:
        typer.echo(str(check))
        for line in check.details():
            typer.echo(f"  {line}")
