"""Writing that leaves either the whole result or what was there before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitkit.runtimes.card import CARD_FILE, read_card
from vitkit.runtimes.errors import BadArtifact, BadRequest

# What a trained run holds beside the files that its card lists.
LOG_FILE, CURVES_FILE, EVENTS_FOLDER = "log.json", "curves.png", "events"


def check_output_folder(out: Path, *, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output folder that cannot be written, or that would cost the user something.

    Only an artifact or run that vitkit wrote itself, with nothing beside it, may be replaced; none of the
    `inputs` may lie in it. Raises BadRequest.
    """
    try:
        place = out.resolve()
        if place.exists() and not place.is_dir():
            raise BadRequest(f"the output {out} is a file; name a folder")
        for given in inputs:
            if given.resolve().is_relative_to(place):
                raise BadRequest(f"the output folder {out} holds {given}, which is read; name another folder")
        if place.is_dir() and any(place.iterdir()) and not _is_ours(place):
            raise BadRequest(f"the output folder {out} holds other files; name another, or empty it")
        check_writable(place)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRequest(f"the output folder {out} cannot be used: {error}") from None


def check_writable(out: Path) -> None:
    """Refuse a path that could not be made, before any work is spent on it; raises BadRequest."""
    try:
        place = out.resolve()
        above = next(parent for parent in (place, *place.parents) if parent.exists())
        folder = above if above.is_dir() else above.parent
        if folder != above and place != above:
            raise BadRequest(f"{out} cannot be written: {above} is a file")
        # Tried, not asked: some file systems say yes and mean no.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".vitkit."):
            pass
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRequest(f"{out} cannot be written: {error}") from None


def _is_ours(folder: Path) -> bool:
    try:
        card = read_card(folder)
    except BadArtifact:
        return False
    ours = {*card.files, CARD_FILE, LOG_FILE, CURVES_FILE, EVENTS_FOLDER}
    return {path.name for path in folder.iterdir()} <= ours


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` when the block ends well, and vanishes otherwise.

    An earlier artifact or run at `out` is replaced. Raises BadRequest where `out` holds anything else, or
    cannot be written.
    """
    check_output_folder(out)
    place = out.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".vitkit.", dir=place.parent))
    except OSError as error:
        raise BadRequest(f"the output folder {out} cannot be made: {error}") from None
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        try:
            if place.exists():
                place.rename(old)
            new.rename(place)
        except OSError as error:
            raise BadRequest(f"the output folder {out} cannot be made: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises BadRequest where its folder cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises BadRequest where its folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BadRequest(f"cannot write {path}: {error.strerror}") from None
