"""Where a classifier's images come from: folders, or tar files on disk or behind a URL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from vitkit.data.folder import Labelled, find_splits, listing_sha256
from vitkit.data.tars import ShardedImages, default_cache, has_index, read_index
from vitkit.runtimes.image import Image, read_image
from vitkit.train.config import TrainConfig
from vitkit.train.memory import in_memory
from vitkit.train.readable import check_readable, unreadable


class ImageSource(Protocol):
    """The images of a split by number.

    `files` names them; `chunks` are the numbers of images that are best read together, in their order.
    """

    files: Sequence[Path]
    chunks: Sequence[int]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[Image, int]:
        """An image (H, W, 3) uint8 RGB and its class number; raises BadInput where it cannot be read."""
        ...

    def expect(self, order: Sequence[int]) -> None:
        """These images are going to be asked for, in this order."""
        ...


class ImageSplits(NamedTuple):
    """What a classifier trains on and is measured on; `digest` changes with the data.

    `notes` say what is odd, but no reason to stop.
    """

    train: ImageSource
    val: ImageSource
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()


def find_images(data: str | Path, config: TrainConfig) -> ImageSplits:
    """The images below a folder with `train/CLASS` and `val/CLASS`, or of an index of shards.

    Raises BadInput where a folder is malformed, or over one in a hundred of its validation images cannot
    be read, and what reading an index raises.
    """
    if has_index(data):
        index = read_index(data)
        train, val = (
            _Sharded(ShardedImages(index, split, default_cache(), config.shard_cache_gb))
            for split in ("train", "val")
        )
        return ImageSplits(train, val, index.classes, index.digest)
    folder = Path(data)
    found = find_splits(folder)
    # Before training, not at the end of a first epoch of hours.
    lost = unreadable(found.val, lambda item: read_image(item[0]))
    check_readable(len(lost), len(found.val), "validation images", lost.values())
    digest = listing_sha256(folder, [path for path, _ in found.train + found.val])
    kept = _Files(found.train, found.classes, config.cache_mb)
    notes = [f"no validation images of: {', '.join(found.unmeasured)}"] if found.unmeasured else []
    return ImageSplits(kept, _Files(found.val, found.classes, 0), found.classes, digest, tuple(notes))


class _Files:
    def __init__(self, items: Sequence[Labelled], classes: Sequence[str], cache_mb: int) -> None:
        numbers = {name: number for number, name in enumerate(classes)}
        self.files: Sequence[Path] = [path for path, _ in items]
        self.chunks: Sequence[int] = [len(items)]
        self.classes = [numbers[name] for _, name in items]
        self.images = in_memory(self.files, read_image, cache_mb, lambda image: image.nbytes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Image, int]:
        return self.images[number], self.classes[number]

    def expect(self, order: Sequence[int]) -> None:
        pass


class _Names(Sequence[Path]):
    """The names of so many images, made when asked for."""

    def __init__(self, images: ShardedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Path:  # type: ignore[override]
        return self.images.name(number)


class _Sharded:
    def __init__(self, images: ShardedImages) -> None:
        self.images = images
        self.files: Sequence[Path] = _Names(images)
        self.chunks: Sequence[int] = images.chunks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Image, int]:
        name, content, label = self.images[number]
        return read_image(name, content), label

    def expect(self, order: Sequence[int]) -> None:
        self.images.expect(order)
