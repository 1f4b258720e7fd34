"""What is printed and saved of raw tensors: an archive of numpy's, since they cannot be drawn."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.files import write_bytes
from vitkit.runtimes.tensors import Tensors

# Raw tensors of images alone, no frames of videos.
VIDEO_OPTIONS = None
# Of the file that `draw` makes.
SUFFIX = ".npz"


class Archive:
    """Arrays by name, to be saved as numpy's archive."""

    def __init__(self, result: Tensors) -> None:
        self._result = result

    def save(self, path: Path) -> None:
        """Write the archive, which `numpy.load` reads; raises BadRequest if its folder cannot be written."""
        content = io.BytesIO()
        # numpy.savez takes names as arguments, so that an output called `file` would break it.
        with zipfile.ZipFile(content, "w") as archive:
            for name, value in self._result.by_name.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, value, allow_pickle=False)
        write_bytes(path, content.getvalue())


def describe(result: Tensors) -> str:
    """Each output's shape and range on one line: `boxes float32 [100, 4] 0..639.5`."""
    return ", ".join(
        f"{name} {value.dtype} {list(value.shape)}"
        + (f" {value.min():g}..{value.max():g}" if value.size else "")
        for name, value in result.by_name.items()
    )


def to_json(result: Tensors) -> dict[str, Any]:
    """Each output's shape, type and values, nested as it is."""
    return {
        "outputs": {
            name: {"shape": list(value.shape), "dtype": str(value.dtype), "values": value.tolist()}
            for name, value in result.by_name.items()
        }
    }


def draw(image: NDArray[np.uint8], result: Tensors) -> Archive:
    """The tensors, to be saved beside the pictures of other tasks; nothing of the image."""
    return Archive(result)
