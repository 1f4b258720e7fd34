"""`vitkit recipes`: what the training recipes set."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_json


def recipes(
    name: Annotated[Optional[str], typer.Argument(help="Show this recipe's values.")] = None,  # noqa: UP045
    json: JsonFlag = False,
) -> None:
    """List the training recipes, or the values of one."""
    from dataclasses import asdict

    from vitkit.train import RECIPES, recipe_named

    if name is not None:
        values = asdict(recipe_named(name))
        if json:
            print_json(values)
        else:
            sources = values.pop("sources")
            for key, value in values.items():
                typer.echo(f"{key} = {value}" + (f"  # {sources[key]}" if key in sources else ""))
        return
    lines = {key: (recipe.__doc__ or "").split("\n")[0] for key, recipe in RECIPES.items()}
    if json:
        print_json(lines)
    else:
        typer.echo("\n".join(f"{key}: {text}" for key, text in lines.items()))
