"""Files: writing that leaves the whole result or what was there before; the folders kept for a user."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from vitkit.runtimes.card import CARD_FILE, read_card
from vitkit.runtimes.errors import BadArtifact, BadRequest, VitkitError

# What a trained run holds beside the files that its card lists.
LOG_FILE, CURVES_FILE, EVENTS_FOLDER = "log.json", "curves.png", "events"
# The variable that names the folder of all programs' files of a kind, and the folder in the home otherwise.
_USER_FOLDERS = {"cache": ("XDG_CACHE_HOME", ".cache"), "config": ("XDG_CONFIG_HOME", ".config")}


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
        with naming(out, new):
            yield new
        try:
            if place.exists():
                place.rename(old)
            new.rename(place)
        except OSError as error:
            raise BadRequest(f"the output folder {out} cannot be made: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def naming(final: Path, temporary: Path) -> Iterator[None]:
    """Let what the block raises name the path that the user knows instead of a temporary one."""
    try:
        yield
    except VitkitError as error:
        old, new = str(temporary), str(final)
        error.args = tuple(arg.replace(old, new) if isinstance(arg, str) else arg for arg in error.args)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises BadRequest where its folder cannot be written.

    What is not UTF-8, as in names of files, is written as `\\udce9`: also what JSON has for it.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


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


def user_folder(kind: Literal["cache", "config"]) -> Path:
    """The folder of vitkit's own files of a kind for this user; it need not exist yet.

    `$XDG_CACHE_HOME/vitkit` or `~/.cache/vitkit`, `$XDG_CONFIG_HOME/vitkit` or `~/.config/vitkit`. A user
    without a home folder that can be written, as in a container started with `--user 1234`, gets a private
    folder in the system's temporary one, and a warning in the log. Raises BadRequest if there is none.
    """
    variable, below = _USER_FOLDERS[kind]
    if named := os.environ.get(variable):
        return Path(named) / "vitkit"
    # Path.home raises it for a user who is in no list of users.
    with suppress(RuntimeError):
        folder = Path.home() / below / "vitkit"
        if _can_be_written(folder) or (kind == "config" and os.path.isdir(folder)):
            return folder
    return _temporary_folder(variable) / kind


def _can_be_written(folder: Path) -> bool:
    above = next((parent for parent in (folder, *folder.parents) if os.path.lexists(parent)), Path())
    return os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK)


@functools.cache
def _temporary_folder(variable: str) -> Path:
    """A folder that nobody but this user can have filled, warned of once in a process."""
    try:
        folder = Path(tempfile.gettempdir()) / f"vitkit-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BadRequest(f"there is no home folder ({error}); name a folder with {variable}=DIR") from None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    if not private:
        raise BadRequest(
            f"there is no home folder, and {folder} is not private to user {os.getuid()}; "
            f"name a folder with {variable}=DIR"
        )
    logging.getLogger("vitkit").warning(
        "there is no home folder that can be written: using %s, which may vanish; set %s=DIR to keep files",
        folder,
        variable,
    )
    return folder
