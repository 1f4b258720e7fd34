"""Finding the image files of a folder, and naming what is left out."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.pillow import pillow

# Pillow's names of the formats that cameras, scanners, the web and data sets use, with the part of Pillow
# that some builds lack. Documents and drawings (EPS, PDF, PSD, WMF), icons, films and textures are left out.
_FORMATS: Mapping[str, str | None] = MappingProxyType(
    {
        "AVIF": "avif",
        "BMP": None,
        "DIB": None,
        "GIF": None,
        "JPEG": "jpg",
        "JPEG2000": "jpg_2000",
        "MPO": "jpg",
        "PCX": None,
        "PNG": "zlib",
        "PPM": None,
        "QOI": None,
        "SGI": None,
        "SUN": None,
        "TGA": None,
        "TIFF": None,
        "WEBP": "webp",
    }
)
# Of the format PPM, but its values are no grey levels.
_OTHERS = frozenset((".pfm",))
# What systems put beside images: thumbnails and copies, never images of the user's own.
_SYSTEM_FOLDERS = frozenset(("@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found"))
_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "icon\r"))
_SHOWN = 3


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Endings of the files that are read as images, such as `.jpg`: those that Pillow decodes here."""
    pil = pillow()
    pil.Image.init()
    with warnings.catch_warnings():
        # An older Pillow warns of parts that it does not know.
        warnings.simplefilter("ignore")
        here = {name for name, part in _FORMATS.items() if part is None or pil.features.check(part)}
    known = pil.Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in here) - _OTHERS


@dataclass(frozen=True)
class ImageListing:
    """The image files below a folder, sorted by path, and the paths below it that are left out, by reason."""

    folder: Path
    images: tuple[Path, ...]
    left_out: Mapping[str, tuple[str, ...]]

    @property
    def note(self) -> str | None:
        """What is left out, as one sentence; None if nothing is."""
        parts = []
        for reason, names in self.left_out.items():
            more = ", ..." if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {reason} ({', '.join(names[:_SHOWN])}{more})")
        return f"left out in {self.folder}: {'; '.join(parts)}" if parts else None


def list_images(folder: Path) -> ImageListing:
    """All image files below a folder, and what is left out.

    Links to folders are followed, to each folder once. Hidden files and folders are not looked at. Raises
    BadInput if the folder does not exist.
    """
    if not folder.is_dir():
        raise BadInput(f"the image folder {folder} does not exist or is not a folder")
    images: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for path, reason in _walk(folder):
        if reason is None:
            images.append(path)
        else:
            left_out.setdefault(reason, []).append(path.relative_to(folder).as_posix())
    images.sort(key=lambda path: path.relative_to(folder).as_posix())
    reasons = {reason: tuple(sorted(names)) for reason, names in sorted(left_out.items())}
    return ImageListing(folder, tuple(images), reasons)


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted by path; the log names what is left out, see `list_images`."""
    listing = list_images(folder)
    if listing.note:
        _warn_once(listing.note)
    return list(listing.images)


@functools.cache
def _warn_once(text: str) -> None:
    logging.getLogger("vitkit").warning("%s", text)


def is_passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or is what systems put beside images."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES | _SYSTEM_FOLDERS


def _walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Files and folders with the reason why they are left out, None for images."""
    root = folder.resolve()
    seen: set[Path] = set()
    # Real folders come before links to them, so that a link is what is left out.
    folders, links = [folder], list[Path]()
    while folders or links:
        here = folders.pop() if folders else links.pop()
        place = here.resolve()
        if place in seen or (here != folder and root.is_relative_to(place)):
            yield here, "links to folders that are read already"
            continue
        seen.add(place)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name, reverse=True)
        except OSError:
            yield here, "folders that cannot be opened"
            continue
        for entry in entries:
            path = here / entry.name
            if not is_passed_over(entry.name) and not os.path.isdir(path):
                yield path, _reason(path)
            elif entry.name.lower() in _SYSTEM_FOLDERS:
                yield path, "folders of thumbnails and the like"
            elif is_passed_over(entry.name):
                continue
            else:
                (links if entry.is_symlink() else folders).append(path)


def _reason(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix not in image_suffixes():
        return f"files {suffix}" if suffix else "files without an ending"
    if os.path.isfile(path):
        return None
    return "broken links" if path.is_symlink() and not os.path.exists(path) else "that are no regular files"
