"""Making data sets in shards: packing image folders, and indexing tar files that other tools made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from vitkit.data.folder import find_splits
from vitkit.data.tars import (
    FORMAT,
    INDEX_FILE,
    LABEL,
    SPLITS,
    ShardFile,
    ShardIndex,
    Tar,
    members,
    read_index,
)
from vitkit.runtimes.card import sha256
from vitkit.runtimes.errors import BadInput, BadRequest, MissingBackend
from vitkit.runtimes.files import atomic_folder, write_text


def write_shards(
    source: Path,
    out: Path,
    per_shard: int = 1000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardIndex:
    """Pack the image folders `source/train` and `source/val` into tar files of `per_shard` images.

    Training images come in a fixed random order, so that each shard holds all classes. The same folder
    gives the same bytes. Raises BadRequest for an output folder that is in use, BadInput for wrong folders.
    """
    if per_shard < 1:
        raise BadRequest(f"a shard of {per_shard} images makes no sense; name at least 1")
    found = find_splits(source)
    total, done = len(found.train) + len(found.val), 0
    with atomic_folder(out) as work:
        for split, items in (("train", found.train), ("val", found.val)):
            items = sorted(items, key=lambda item: _rank(item[0].relative_to(source)))
            for number, start in enumerate(range(0, len(items), per_shard)):
                part = items[start : start + per_shard]
                samples = [(path, found.classes.index(label)) for path, label in part]
                _write_tar(work / f"{split}-{number:06d}.tar", samples, start)
                done += len(part)
                progress(done, total)
        _write_index(work, found.classes)
    return read_index(out)


def _rank(path: Path) -> bytes:
    """A place in an order that looks random and is the same everywhere."""
    return hashlib.sha256(os.fsencode(path.as_posix())).digest()


def _write_tar(target: Path, samples: Sequence[tuple[Path, int]], first: int) -> None:
    try:
        import webdataset
    except ImportError as error:
        raise MissingBackend("webdataset", "shards", error) from None
    with target.open("wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
        for number, (path, label) in enumerate(samples, start=first):
            suffix = path.suffix.lower().removeprefix(".")
            tar.write({"__key__": f"{number:08d}", suffix: path.read_bytes(), LABEL: str(label).encode()})


def index_shards(folder: Path, classes: Sequence[str] = ()) -> ShardIndex:
    """Write the index of tar files that other tools made: `train*.tar` and `val*.tar` of a folder.

    `classes` are the names of the classes by number; without them, names are what stands in `cls`. Raises
    BadInput where a split has no tar file, or one is damaged or holds samples without image or class.
    """
    if (folder / INDEX_FILE).exists():
        raise BadRequest(f"{folder / INDEX_FILE} exists; remove it to make it anew")
    _write_index(folder, classes or _occurring(folder))
    return read_index(folder)


def _occurring(folder: Path) -> list[str]:
    """The classes in the samples' labels: as many numbers as there are, or the names, sorted."""
    labels = set()
    for path in folder.glob("*.tar"):
        tar = Tar(path)
        with tar.file:
            labels |= {tar.read(sample[LABEL]).decode("utf-8", "replace").strip() for sample in tar.samples}
    if all(label.isdecimal() for label in labels):
        return [str(number) for number in range(max(map(int, labels), default=-1) + 1)]
    return sorted(labels)


def _write_index(folder: Path, classes: Sequence[str]) -> None:
    splits = {}
    for split in SPLITS:
        paths = sorted(folder.glob(f"{split}*.tar"))
        if not paths:
            raise BadInput(f"{folder} has no {split}*.tar")
        splits[split] = [asdict(_described(path)) for path in paths]
    body = {"format": FORMAT, "classes": list(classes), "splits": splits}
    write_text(folder / INDEX_FILE, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def _described(path: Path) -> ShardFile:
    return ShardFile(path.name, len(members(path)), path.stat().st_size, sha256(path))
