"""`vitkit import`: somebody's checkpoint into a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vitkit.cli.arguments import OptionPairs
from vitkit.cli.show import key_values, say

if TYPE_CHECKING:
    from vitkit.models import Labels
    from vitkit.models.state import Kind


def import_(
    file: Annotated[
        Path, typer.Argument(help="The checkpoint: .pth or .safetensors; or timm:NAME, timm:NAME=FILE.")
    ],
    format: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--format", help="Layout of the checkpoint: psvit or kmax."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="Model that the weights belong to (see: vitkit models)."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Run folder to write (runs/MODEL, if it does not exist)."),
    ] = None,
    option: OptionPairs = None,
    weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--weights",
            help="Which weights to take of a checkpoint that holds both: plain, as they were trained (unless "
            "there are none), or ema, their moving average.",
        ),
    ] = None,
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
    --option num_classes=N and --categories. A network of timm is timm:NAME, or timm:NAME=FILE.
    """
    from dataclasses import asdict, replace

    from vitkit.models import configure, run_card
    from vitkit.models.checkpoints import load_checkpoint
    from vitkit.runs import save_run
    from vitkit.runtimes.card import sha256
    from vitkit.runtimes.errors import BadRequest
    from vitkit.runtimes.files import check_output_folder

    if str(file).startswith("timm:"):
        if any((format, model, option, weights, reset_head, categories)):
            raise BadRequest(f"{file} is a network of timm with its own layout; give it no option but -o")
        _import_timm(str(file), out)
        return
    if format is None or model is None:
        raise BadRequest("a checkpoint needs --format and --model; networks of timm are timm:NAME=FILE")
    kind = _kind(weights)
    options = key_values(option or [], "--option")
    config = configure(model, options)
    folder = out or _default_folder(model)
    check_output_folder(folder, inputs=[file, categories] if categories else [file])
    card = run_card(model, config)
    # Panoptic networks tell things from stuff, and COCO's lists of categories say which are things.
    has_things = "things" in card.decode
    labels = _labels(has_things, config.num_classes, categories)
    imported = load_checkpoint(file, format, model, options, reset_head=reset_head, kind=kind)
    card = run_card(model, config, labels)
    if len(imported.kinds) > 1:
        say(
            f"{file.name} holds plain weights and their moving average (EMA); these are the {imported.kind} "
            f"ones: --weights {' or '.join(imported.kinds)} chooses"
        )
    source = {"imported": file.name, "format": format, "sha256": sha256(file)}
    if len(imported.kinds) > 1 or imported.kind != "plain":
        source["kind"] = imported.kind
    if imported.reset:
        source["reset"] = ", ".join(imported.reset)
        say(f"left fresh, for {config.num_classes} classes: {source['reset']}")
    if imported.ignored:
        say(f"left out: {len(imported.ignored)} tensors that only training needs")
    if has_things and card.labels[0] == "0":
        say("classes go by their numbers and are all taken for things; --categories FILE names them")
    card = replace(card, provenance={**card.provenance, "weights": source})
    save_run(folder, imported.model, card, {"model": model, "options": asdict(config)})
    say(f"{folder}: {model} with the weights of {file.name}")


def _import_timm(word: str, out: Path | None) -> None:
    from vitkit.cli.card_flags import say_card
    from vitkit.exporters.foreign import ForeignModule
    from vitkit.runs import save_run
    from vitkit.runtimes.files import check_output_folder
    from vitkit.sources import CardValues, check_word, parse_word, timm_models

    parsed = parse_word(word)
    check_word(parsed, CardValues())
    folder = out or _default_folder(parsed.name)
    check_output_folder(folder, inputs=[parsed.path] if parsed.path else [])
    source = timm_models.load(parsed.rest, CardValues())
    assert isinstance(source.module, ForeignModule)
    say_card(source.card)
    save_run(folder, source.module.network, source.card, {"source": source.card.provenance["source"]})
    say(f"{folder}: {source.card.name}")


def _default_folder(model: str) -> Path:
    """The folder under runs/; only a folder that the user names may replace a run."""
    from vitkit.runtimes.errors import BadRequest

    folder = Path("runs") / model
    if folder.exists():
        raise BadRequest(f"{folder} exists already; name the run's folder, with: -o FOLDER")
    return folder


def _kind(text: str | None) -> Kind | None:
    from vitkit.models.state import KINDS
    from vitkit.runtimes.errors import BadRequest

    for kind in KINDS:
        if text == kind:
            return kind
    if text is not None:
        raise BadRequest(f"--weights {text!r} is neither {' nor '.join(KINDS)}")
    return None


def _labels(has_things: bool, classes: int, categories: Path | None) -> Labels | None:
    """Names for a model's classes: of the file, or ImageNet's for a classifier that has 1000."""
    from vitkit.models import Labels
    from vitkit.runtimes.errors import BadInput, BadRequest

    if categories is not None:
        if not has_things:
            raise BadRequest("--categories names the classes of panoptic models; this one is a classifier")
        labels = _read_categories(categories)
        if len(labels.names) != classes:
            raise BadInput(
                f"{categories} names {len(labels.names)} categories, the model has {classes} classes "
                f"(--option num_classes={len(labels.names)} changes that)"
            )
        return labels
    if has_things or classes != 1000:
        return None
    from vitkit.torchvision_shim import timm

    info = timm.data.ImageNetInfo()
    names = tuple(info.index_to_description(i) for i in range(1000))
    return Labels(names, tuple(info.index_to_label_name(i) for i in range(1000)))


def _read_categories(file: Path) -> Labels:
    """The classes in COCO's panoptic JSON, or in its list of categories alone, in the order of their ids."""
    from vitkit.models import Labels
    from vitkit.runtimes.errors import BadInput
    from vitkit.runtimes.reading import MAX_DATA_JSON_BYTES, read_json

    try:
        body = read_json(file, MAX_DATA_JSON_BYTES)
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
