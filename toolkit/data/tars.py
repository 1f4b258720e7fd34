"""Labelled images in tar files (webdataset's layout), beside an index: for sets that no single disk holds.

A sample is the files of one name before the first dot: an image and `cls`, its class by number or by name.
`index.json` lists the tar files of each split with their samples and hashes, so that any sample can be
found by its number, which is what makes a training run with shards resumable at any step. Tar files behind a
URL come into a cache, each when it is needed or just before. Nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import tarfile
import threading
import time
import urllib.request
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock

from vitkit.runtimes.card import sha256
from vitkit.runtimes.errors import BadArtifact, BadInput, DeviceError
from vitkit.runtimes.files import user_folder
from vitkit.runtimes.listing import image_suffixes
from vitkit.runtimes.reading import MAX_REPORT_BYTES, read_file

INDEX_FILE = "index.json"
FORMAT = 1
SPLITS = ("train", "val")
LABEL = "cls"
_TRIES, _PAUSE_S, _TIMEOUT_S = 4, 1.0, 60.0
_GB = 2**30
# Tar files that a process holds open: more than a shuffling window spans.
_OPEN = 8
# What a server's answer may raise on the way.
_BROKEN = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class ShardFile:
    """A tar file: its name beside the index, how many samples and bytes it has, and its SHA-256."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The tar files of a data set; `base` is the folder or URL they are in, `digest` changes with them."""

    base: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[ShardFile, ...]]
    digest: str


def is_url(where: str) -> bool:
    """Is it an address of the web, rather than a path?"""
    return where.startswith(("http://", "https://"))


def has_index(where: str | Path) -> bool:
    """Is it a data set in shards: a URL, an index, or a folder with one?"""
    return is_url(str(where)) or str(where).endswith(".json") or (Path(where) / INDEX_FILE).is_file()


def read_index(where: str | Path) -> ShardIndex:
    """The index of a data set in shards, given by its address, its path, or the folder it is in.

    Raises BadInput where it cannot be read or has not the right form, DeviceError where its address does
    not answer.
    """
    place = str(where)
    if not place.endswith(".json"):
        place = f"{place.rstrip('/')}/{INDEX_FILE}"
    try:
        content = _get(place) if is_url(place) else read_file(place, MAX_REPORT_BYTES)
        body = json.loads(content)
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {body['format']!r}, known is {FORMAT}")
        splits = {
            name: tuple(_checked(ShardFile(**entry)) for entry in body["splits"][name]) for name in SPLITS
        }
        classes = tuple(map(str, body["classes"]))
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"the index of shards {place} cannot be read: {error!r}") from None
    if len(classes) < 2 or not all(splits.values()):
        raise BadInput(f"{place} has {len(classes)} classes and a split without shards; make it anew")
    return ShardIndex(place.rpartition("/")[0] or ".", classes, splits, hashlib.sha256(content).hexdigest())


def _checked(entry: ShardFile) -> ShardFile:
    # The name becomes a path below the cache.
    if PurePosixPath(entry.file).name != entry.file or entry.file.startswith("."):
        raise ValueError(f"{entry.file!r} is no plain file name")
    if entry.samples < 1:
        raise ValueError(f"{entry.file} has {entry.samples} samples")
    return entry


class Member(NamedTuple):
    """A file in a tar file: where its bytes start, and how many there are."""

    start: int
    size: int


class Tar:
    """An open tar file; any number of threads and forked processes may read it.

    Raises BadArtifact where it is damaged, or does not hold as many samples as it should.
    """

    def __init__(self, path: Path, samples: int | None = None) -> None:
        self.file: BinaryIO = path.open("rb")
        self.samples = members(path)
        if samples is not None and len(self.samples) != samples:
            raise BadArtifact(f"{path} holds {len(self.samples)} samples, its index says {samples}")

    def read(self, member: Member) -> bytes:
        """A member's bytes."""
        return os.pread(self.file.fileno(), member.size, member.start)


def members(path: Path) -> list[dict[str, Member]]:
    """The samples of a tar file, by the endings of their files; raises BadArtifact for a damaged one."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in filter(tarfile.TarInfo.isreg, tar):
                folder, _, name = info.name.rpartition("/")
                key, _, ending = name.partition(".")
                samples.setdefault(f"{folder}/{key}", {})[ending.lower()] = Member(
                    info.offset_data, info.size
                )
            if tar.offset > path.stat().st_size:
                raise tarfile.ReadError("it is cut off")
    except FileNotFoundError:
        raise
    except (OSError, tarfile.TarError) as error:
        raise BadArtifact(f"the shard {path} is damaged: {error}") from None
    whole = [sample for sample in samples.values() if LABEL in sample and image_ending(sample)]
    if len(whole) != len(samples):
        raise BadArtifact(f"{path}: {len(samples) - len(whole)} samples lack an image or their {LABEL}")
    return whole


def image_ending(sample: dict[str, Member]) -> str | None:
    """Which of a sample's files is its image."""
    return next((ending for ending in sample if f".{ending}" in image_suffixes()), None)


class ShardedImages:
    """A split's images by number, each as (name, bytes of the file, class number).

    `chunks` are the images of each tar file. Tar files behind a URL are fetched into the folder `cache`,
    from which those used longest ago go where it would hold more than `limit_gb`.
    """

    def __init__(self, index: ShardIndex, split: str, cache: Path, limit_gb: float) -> None:
        self.index, self.shards = index, index.splits[split]
        self.chunks = [shard.samples for shard in self.shards]
        self.starts = [0, *accumulate(self.chunks)]
        self.cache, self.limit = cache, limit_gb * _GB
        self.following: dict[int, int] = {}
        self.open: OrderedDict[int, Tar] = OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def name(self, number: int) -> Path:
        """How an image is called: `train-000003.tar/17`."""
        shard = bisect_right(self.starts, number) - 1
        return Path(self.shards[shard].file) / str(number - self.starts[shard])

    def expect(self, order: Sequence[int]) -> None:
        """The images of the epoch to come: each tar file's successor is fetched while it is read."""
        shards = list(dict.fromkeys(bisect_right(self.starts, number) - 1 for number in order))
        self.following = dict(pairwise(shards))

    def __getitem__(self, number: int) -> tuple[Path, bytes, int]:
        shard = bisect_right(self.starts, number) - 1
        tar, name = self._tar(shard), self.name(number)
        sample = tar.samples[number - self.starts[shard]]
        ending = image_ending(sample)
        assert ending is not None
        return name, tar.read(sample[ending]), self._class(name, tar.read(sample[LABEL]))

    def _class(self, name: Path, content: bytes) -> int:
        text, classes = content.decode("utf-8", "replace").strip(), self.index.classes
        number = int(text) if text.isdecimal() else classes.index(text) if text in classes else -1
        if not 0 <= number < len(classes):
            raise BadInput(f"{name} is of the class {text[:40]!r}, which the index does not name")
        return number

    def _tar(self, shard: int) -> Tar:
        if shard not in self.open:
            self.open[shard] = self._opened(self.shards[shard])
            while len(self.open) > _OPEN:
                self.open.popitem(last=False)[1].file.close()
            if is_url(self.index.base) and shard in self.following:
                following = self.shards[self.following[shard]]
                threading.Thread(target=self._ahead, args=(following,), daemon=True).start()
        self.open.move_to_end(shard)
        return self.open[shard]

    def _opened(self, shard: ShardFile) -> Tar:
        try:
            if not is_url(self.index.base):
                return Tar(Path(self.index.base) / shard.file, shard.samples)
            for _ in range(_TRIES):
                # Somebody else, fetching another one, may just have made room of it.
                with suppress(FileNotFoundError):
                    return Tar(self._fetched(shard), shard.samples)
        except OSError as error:
            raise DeviceError(f"the shard {shard.file} cannot be opened: {error}") from None
        raise DeviceError(
            f"the cache of shards {self.cache} is too small for all who read from it: --set shard_cache_gb=N"
        )

    def _fetched(self, shard: ShardFile) -> Path:
        """Where a tar file is here, once it is."""
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / f"{shard.sha256[:16]}-{shard.file}"
        with FileLock(f"{path}.lock"):
            if path.exists():
                os.utime(path)
            else:
                self._make_room(shard.bytes)
                fetch(f"{self.index.base}/{shard.file}", path, shard.sha256)
        return path

    def _ahead(self, shard: ShardFile) -> None:
        # Whoever needs it next tries again and says what is wrong.
        with suppress(DeviceError, OSError):
            self._fetched(shard)

    def _make_room(self, size: int) -> None:
        """Remove the tar files used longest ago; a process that reads one keeps it until it closes it."""
        kept = []
        for path in self.cache.glob("*.tar"):
            with suppress(FileNotFoundError):
                kept.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(length for _, length, _ in kept)
        for _, length, path in sorted(kept):
            if total + size > self.limit:
                path.unlink(missing_ok=True)
                total -= length


def default_cache() -> Path:
    """Where tar files are kept: `shards` in the user's cache folder."""
    return user_folder("cache") / "shards"


def fetch(url: str, target: Path, digest: str) -> None:
    """Download a file and check its SHA-256; what an interrupted download left is gone on with.

    Raises DeviceError where it cannot be had whole in several tries.
    """
    partial = target.with_name(f"{target.name}.partial")
    for attempt in range(_TRIES):
        time.sleep(_PAUSE_S * attempt)
        problem: object = None
        try:
            _download(url, partial)
        except _BROKEN as error:
            problem = error
        if partial.exists() and sha256(partial) == digest:
            partial.replace(target)
            return
        if problem is None:
            problem = f"its {partial.stat().st_size} bytes are not those that the index names"
            partial.unlink()
    raise DeviceError(f"{url} cannot be had in {_TRIES} tries: {problem}")


def _download(url: str, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    with _asked(url, have) as answer:
        # A server that knows no ranges sends all of it.
        with partial.open("ab" if answer.status == http.client.PARTIAL_CONTENT else "wb") as file:
            while block := answer.read(2**20):
                file.write(block)
        if answer.length:
            raise ConnectionError(f"the connection ended {answer.length} bytes early")


def _asked(url: str, start: int) -> Any:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S)


def _get(url: str) -> bytes:
    try:
        with _asked(url, 0) as answer:
            return bytes(answer.read())
    except _BROKEN as error:
        raise DeviceError(f"{url} cannot be had: {error}") from None
