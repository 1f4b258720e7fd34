"""Labelled image folders: `DIR/CLASS/**/*.jpg`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from vitkit.runtimes.card import text_problem
from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.listing import find_images, image_suffixes, is_passed_over

Labelled = tuple[Path, str]
# A message names this many of the classes that are wrong.
_SHOWN = 8


def labelled_images(folder: Path) -> list[Labelled]:
    """All images below `folder` with their class, the first folder on the way to them; sorted by path.

    The name of a class is in Unicode's normal form NFC, whatever form its folder has. Raises BadInput if the
    folder is missing, holds no image, or holds images outside class folders, and for two folders of one name.
    """
    paths = find_images(folder)
    if not paths:
        raise BadInput(f"{folder} holds no images; they belong into {folder}/CLASS/")
    if loose := [path for path in paths if path.parent == folder]:
        raise BadInput(
            f"{len(loose)} images lie directly in {folder}, {loose[0].name} first: "
            f"their class is unknown; move them into {folder}/CLASS/"
        )
    items = []
    folders: dict[str, str] = {}
    for path in paths:
        name = path.relative_to(folder).parts[0]
        label = normalize("NFC", name)
        if folders.setdefault(label, name) != name:
            raise BadInput(
                f"{folder} has two folders named {label!r}, in different normal forms of Unicode; move the "
                "images of both into one folder"
            )
        items.append((path, label))
    return items


def class_names(items: Iterable[Labelled]) -> tuple[str, ...]:
    """The classes that occur, sorted: the order in which a model's outputs are numbered."""
    return tuple(sorted({name for _, name in items}))


@dataclass(frozen=True)
class Splits:
    """The files of `DIR/train` and `DIR/val`, the classes of both, and those that `val` has no image of."""

    train: list[Labelled]
    val: list[Labelled]
    classes: tuple[str, ...]
    unmeasured: tuple[str, ...]


def find_splits(data: Path) -> Splits:
    """List the image folders `data/train` and `data/val`.

    Raises BadInput where one is missing or malformed, `train` has a class without images or one class
    alone, or `val` holds a class that `train` does not.
    """
    for split in ("train", "val"):
        if not (data / split).is_dir():
            raise BadInput(
                f"the folder {data / split} is missing; a classifier learns from {data}/train/CLASS/ and is "
                f"measured on {data}/val/CLASS/"
            )
    train, val = labelled_images(data / "train"), labelled_images(data / "val")
    classes = class_names(train)
    _check_full(data / "train", classes)
    _check_names(data / "train", classes)
    if unknown := sorted(set(class_names(val)) - set(classes)):
        raise BadInput(f"{data / 'val'} holds classes that {data / 'train'} lacks: {', '.join(unknown)}")
    if len(classes) == 1:
        raise BadInput(
            f"{data / 'train'} holds the class {classes[0]!r} alone, and a classifier tells at least two "
            f"apart; each needs a folder {data / 'train'}/CLASS/"
        )
    return Splits(train, val, classes, tuple(sorted(set(classes) - set(class_names(val)))))


def _check_names(folder: Path, classes: Sequence[str]) -> None:
    """Refuse names that could not be labels in a card."""
    for name in classes:
        if problem := text_problem(name):
            raise BadInput(
                f"the name of the class folder {name!r} in {folder} {problem}, so that it cannot be a label; "
                f"rename it: mv {_quoted(folder / name)} NAME"
            )


def _quoted(path: Path) -> str:
    """A path as bash takes it, whatever bytes it has."""
    plain = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(path)
    )
    return f"$'{''.join(plain)}'"


def _check_full(folder: Path, classes: Sequence[str]) -> None:
    names = [path.name for path in folder.iterdir() if path.is_dir() and not is_passed_over(path.name)]
    if empty := sorted(name for name in names if normalize("NFC", name) not in classes):
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise BadInput(
            f"class folders in {folder} hold no image ({' '.join(sorted(image_suffixes()))}) that is "
            f"not read already: {', '.join(empty[:_SHOWN])}{more}. Put images there, or remove the folder: "
            f"rmdir {folder / empty[0]}"
        )


def listing_sha256(folder: Path, paths: Sequence[Path]) -> str:
    """Hex SHA-256 over the names and sizes of files below a folder; reading ImageNet would take minutes."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path.relative_to(folder).as_posix()))
        digest.update(f"\n{path.stat().st_size}\n".encode())
    return digest.hexdigest()
