"""Commands that make things: models, import, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vitkit.cli import app
from vitkit.cli.show import key_values, print_json, print_table, say

if TYPE_CHECKING:
    from vitkit.exporters.parity import Check
    from vitkit.models import Labels
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
    format: Annotated[str, typer.Option("--format", help="Layout of the checkpoint: psvit or kmax.")],
    model: Annotated[
        str, typer.Option("--model", help="Model that the weights belong to (see: vitkit models).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")],
    option: OptionPairs = None,
    reset_head: Annotated[
        bool, typer.Option("--reset-head", help="Leave out the class heads; the model's start fresh.")
    ] = False,
    categories: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--categories",
            help="Classes of a panoptic model, by id: COCO's panoptic JSON, or its list of categories.",
        ),
    ] = None,
) -> None:
    """Turn somebody's checkpoint into a run, without running any code in it.

    For the authors' released PS-ViT weights add --option qk_scale=dim. kMaX-DeepLab with ResNet-50, from its
    authors' PyTorch port, is --format kmax --model kmax_b; for other classes than COCO's add
    --option num_classes=N and --categories.
    """
    from dataclasses import asdict, replace

    from vitkit.models import configure, model_info, run_card
    from vitkit.models.checkpoints import load_checkpoint
    from vitkit.runs import save_run
    from vitkit.runtimes.card import sha256
    from vitkit.runtimes.files import check_output_folder

    check_output_folder(out, inputs=[file, categories] if categories else [file])
    options = key_values(option or [], "--option")
    config = configure(model, options)
    task = model_info(model).task
    labels = _labels(task, config.num_classes, categories)
    imported = load_checkpoint(file, format, model, options, reset_head=reset_head)
    card = run_card(model, config, labels)
    weights = {"imported": file.name, "format": format, "sha256": sha256(file)}
    if imported.reset:
        weights["reset"] = ", ".join(imported.reset)
        say(f"left fresh, for {config.num_classes} classes: {weights['reset']}")
    if imported.ignored:
        say(f"left out: {len(imported.ignored)} tensors that only training needs")
    if task == "panoptic" and card.labels[0] == "0":
        say("classes go by their numbers and are all taken for things; --categories FILE names them")
    card = replace(card, provenance={**card.provenance, "weights": weights})
    save_run(out, imported.model, card, {"model": model, "options": asdict(config)})
    say(f"{out}: {model} with the weights of {file.name}")


def _labels(task: str, classes: int, categories: Path | None) -> Labels | None:
    """Names for a model's classes: of the file, or ImageNet's for a classifier that has 1000."""
    from vitkit.models import Labels
    from vitkit.runtimes.errors import BadInput, BadRequest

    if categories is not None:
        if task != "panoptic":
            raise BadRequest("--categories names the classes of panoptic models; this one is a classifier")
        labels = _read_categories(categories)
        if len(labels.names) != classes:
            raise BadInput(
                f"{categories} names {len(labels.names)} categories, the model has {classes} classes "
                f"(--option num_classes={len(labels.names)} changes that)"
            )
        return labels
    if task == "panoptic" or classes != 1000:
        return None
    from vitkit.torchvision_shim import timm

    info = timm.data.ImageNetInfo()
    names = tuple(info.index_to_description(i) for i in range(1000))
    return Labels(names, tuple(info.index_to_label_name(i) for i in range(1000)))


def _read_categories(file: Path) -> Labels:
    """The classes in COCO's panoptic JSON, or in its list of categories alone, in the order of their ids."""
    import json

    from vitkit.models import Labels
    from vitkit.runtimes.errors import BadInput

    try:
        body = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read as JSON: {error}") from None
    entries = body.get("categories") if isinstance(body, dict) else body
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{file} holds no list of categories")
    found: dict[int, tuple[str, bool]] = {}
    for i, entry in enumerate(entries):
        match entry:
            case {"id": int(number), "name": str(name), "isthing": 0 | 1 as thing} if (
                name and name.isprintable() and number >= 0
            ):
                if number in found:
                    raise BadInput(f"{file}: the category id {number} occurs twice")
                found[number] = name, bool(thing)
            case _:
                raise BadInput(f"{file}: category {i} must have an id, a name, and isthing as 0 or 1")
    ordered = sorted(found.items())
    return Labels(
        tuple(name for _, (name, _) in ordered),
        tuple(str(int(number)) for number, _ in ordered),
        tuple(thing for _, (_, thing) in ordered),
    )


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A run folder; or a model name, with --untrained.")],
    target: Annotated[str, typer.Option("--target", help="onnx, openvino, tflite or tensorrt.")],
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
    trt_version: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--trt-version", help="TensorRT that will build the package: 8.5, 8.6, 10 or 11 (10)."),
    ] = None,
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
    int8, calibration.json. A broken engine is not written, and exits with 1. For tensorrt it holds a package,
    whose graph is verified here, and which vitkit build compiles where it is to run.
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
    exporters.check_request(target, precision, input=input, batch=size, opset=opset, trt_version=trt_version)
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
        trt_version=trt_version,
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
    if exporters.TARGETS[target].stand_in:
        say(f"nothing is built yet; on the machine that is to run it: vitkit build {out} -o {out}-built")


@app.command()
def build(
    package: Annotated[Path, typer.Argument(help="Artifact folder of target tensorrt.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Artifact folder to write (this machine's cache)."),
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Replay a recorded CUDA graph at every run.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Build the engine of a TensorRT package, on the machine and GPU that are to run it.

    The engine is compared with the float model's golden outputs; a broken one is not written, and exits with
    1. Without --out it is kept in this machine's cache, where whatever opens the package finds it.
    """
    from vitkit.exporters.tensorrt import build

    say("building, which takes minutes ...")
    artifact, check = build(package, out, cuda_graph=cuda_graph)
    if json:
        print_json(
            {"artifact": str(artifact.path), "bytes": artifact.size_bytes, "checks": [check.summary()]}
        )
        return
    print_checks([check])
    say(f"{artifact.path}: {artifact.card.name}, {artifact.card.precision}, built")


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
