"""Labelled image folders: `DIR/CLASS/**/*.jpg`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.image import find_images

Labelled = tuple[Path, str]


def labelled_images(folder: Path) -> list[Labelled]:
    """All images below `folder` with their class, the first folder on the way to them; sorted by path.

    Raises BadInput where the folder is missing, holds no image, or holds images outside class folders.
    """
    paths = find_images(folder)
    if not paths:
        raise BadInput(f"{folder} holds no images; they belong into {folder}/CLASS/")
    if loose := [path for path in paths if path.parent == folder]:
        raise BadInput(
            f"{len(loose)} images lie directly in {folder}, {loose[0].name} first: "
            f"their class is unknown; move them into {folder}/CLASS/"
        )
    return [(path, path.relative_to(folder).parts[0]) for path in paths]


def class_names(items: Iterable[Labelled]) -> tuple[str, ...]:
    """The classes that occur, sorted: the order in which a model's outputs are numbered."""
    return tuple(sorted({name for _, name in items}))
