"""Writing that leaves either the whole result or what was there before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitkit.runtimes.card import CARD_FILE
from vitkit.runtimes.errors import BadRequest


def check_output_folder(out: Path) -> None:
    """Refuse an output folder that holds something vitkit did not write; raises BadRequest."""
    if out.exists() and not out.is_dir():
        raise BadRequest(f"the output {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CARD_FILE).is_file():
        raise BadRequest(f"the output folder {out} holds other files; name a new folder, or empty it first")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` when the block ends well, and vanishes otherwise.

    An earlier artifact or run at `out` is replaced. Raises BadRequest where `out` holds anything else.
    """
    check_output_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises BadRequest where its folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadRequest(f"cannot write {path}: {error.strerror}") from None
