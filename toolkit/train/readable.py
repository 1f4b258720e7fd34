"""Images that cannot be read: up to one in a hundred is left out and named, more are refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vitkit.runtimes.errors import BadInput

_SHARE = 0.01
_NAMED = 8
_THREADS = 8


def check_readable(count: int, images: int, what: str, reasons: Collection[str]) -> None:
    """Raise BadInput where `count`, over one in a hundred of so many images, cannot be read.

    `what` they are is such as `training images`; `reasons` name the files, and may be those of one process
    alone.
    """
    if count <= _SHARE * images:
        return
    shown = sorted(reasons)[:_NAMED]
    more = [f"and {count - len(shown)} more"] if count > len(shown) else []
    raise BadInput(
        f"{count} of {images} {what} cannot be read, over {_SHARE:.0%}: {'; '.join(shown + more)}. Restore "
        "them, or remove them and train anew"
    )


def unreadable(items: Sequence[Any], read: Callable[[Any], object]) -> dict[int, str]:
    """Why `read` raises BadInput for items, by their numbers; several are read at a time."""

    def reason(item: Any) -> str | None:
        try:
            read(item)
        except BadInput as error:
            return str(error)
        return None

    # The reader mutes Pillow's warnings, which in threads would not be put back.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(reason, items))
    return {number: text for number, text in enumerate(found) if text is not None}
