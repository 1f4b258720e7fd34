"""The flags that say what a card holds, of networks from outside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vitkit.cli.show import say

if TYPE_CHECKING:
    from vitkit.runtimes.card import ModelCard
    from vitkit.sources import CardValues

_PANEL = "The card of a network from outside"
_Text = Optional[str]  # noqa: UP045
_File = Optional[Path]  # noqa: UP045

CardFile = Annotated[
    _File, typer.Option("--card", help="TOML with size, mean, std, labels, ...", rich_help_panel=_PANEL)
]
Task = Annotated[
    _Text, typer.Option("--task", help="classification, semantic or tensors.", rich_help_panel=_PANEL)
]
Size = Annotated[
    _Text, typer.Option("--size", help="HEIGHT,WIDTH of its input in pixels.", rich_help_panel=_PANEL)
]
Mean = Annotated[
    _Text, typer.Option("--mean", help="R,G,B subtracted from pixels of 0..1.", rich_help_panel=_PANEL)
]
Std = Annotated[
    _Text, typer.Option("--std", help="R,G,B that these are then divided by.", rich_help_panel=_PANEL)
]
Colour = Annotated[_Text, typer.Option("--colour", help="RGB or BGR.", rich_help_panel=_PANEL)]
Fit = Annotated[
    _Text, typer.Option("--fit", help="cover (and crop), contain (and pad), stretch.", rich_help_panel=_PANEL)
]
CropPct = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--crop-pct", help="Share of the scaled image that is kept.", rich_help_panel=_PANEL),
]
Interpolation = Annotated[
    _Text, typer.Option("--interpolation", help="nearest, bilinear or bicubic.", rich_help_panel=_PANEL)
]
LabelsFile = Annotated[
    _File,
    typer.Option("--labels", help="Names of the classes, a line each, or JSON.", rich_help_panel=_PANEL),
]
Outputs = Annotated[
    _Text, typer.Option("--outputs", help="Names of its outputs, as a,b,c.", rich_help_panel=_PANEL)
]
KeepFloat = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--keep-float",
        help="Module paths that stay float, as blocks.0.*; may repeat.",
        rich_help_panel=_PANEL,
    ),
]


def card_values(
    file: Path | None,
    labels: Path | None,
    *,
    task: str | None,
    size: str | None,
    mean: str | None,
    std: str | None,
    colour: str | None,
    fit: str | None,
    crop_pct: float | None,
    interpolation: str | None,
    outputs: str | None,
) -> CardValues:
    """What the flags say, and beneath them the file of `--card`. Raises BadRequest and BadInput."""
    from vitkit.sources.card_values import CardValues, read_card_values, read_labels

    given: dict[str, Any] = {
        "task": task,
        "size": _numbers("--size", size, int, 2),
        "mean": _numbers("--mean", mean, float, 3),
        "std": _numbers("--std", std, float, 3),
        "colour": colour.upper() if colour else None,
        "fit": fit,
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "outputs": tuple(part.strip() for part in outputs.split(",")) if outputs else None,
    }
    values = CardValues(**given)
    if labels is not None:
        values = values.over(read_labels(labels))
    return values if file is None else values.over(read_card_values(file))


def _numbers(flag: str, text: str | None, kind: type, count: int) -> tuple[Any, ...] | None:
    """`224,224` or `224x224`, or one number for all."""
    from vitkit.runtimes.errors import BadRequest

    if text is None:
        return None
    try:
        found = tuple(kind(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        found = ()
    if len(found) not in (1, count):
        raise BadRequest(
            f"{flag} is {text!r}; give {count} numbers as {','.join('1' * count)}, or one for all"
        )
    return found * count if len(found) == 1 else found


def say_card(card: ModelCard) -> None:
    """Print what a card from outside holds, and what of it was assumed."""
    image = card.image
    height, width = image.size
    how = {"cover": f"cover, crop {image.crop_pct:g}", "contain": f"contain, pad {image.pad}"}.get(image.fit)
    say(
        f"{card.name}: {card.task}; image {height}x{width} {image.colour}, {how or image.fit}, "
        f"{image.interpolation}, mean {_shown(image.mean)}, std {_shown(image.std)}"
    )
    names = f"; {len(card.labels)} labels, {', '.join(card.labels[:3])} ..." if card.labels else ""
    say(f"outputs {'; '.join(map(str, card.outputs))}{names}")
    for name, value in card.provenance.get("assumed", {}).items():
        say(f"assumed: {name.replace('_', ' ')} {value}")


def _shown(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
